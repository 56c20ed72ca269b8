"""The numerics profile: everything besides its inputs that an operation's bits may depend on."""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.contract import CONTRACT_VERSION, LSE_SEGMENTS


@dataclass(frozen=True, kw_only=True)
class NumericsProfile:
    """Two runs promise equal bits only under equal profiles."""

    device_type: str
    architecture: str
    tp_size: int = 1
    """1 under tp_invariant: a forward's bits do not depend on it."""
    tp_invariant: bool = False
    kv_tile: int | None
    kv_split: int | None
    lse_segments: int = LSE_SEGMENTS
    attention: str
    """The kind's name; kv_tile and kv_split are its constants."""
    contract_version: int = CONTRACT_VERSION
    torch_version: str = torch.__version__
    triton_version: str = importlib.metadata.version("triton")

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the profile in manifests and reports."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu_architecture() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    family = [fields.get(name, "?") for name in ("vendor_id", "cpu family", "model")]
    return f"{platform.machine()} {' '.join(family)} {torch.backends.cpu.get_cpu_capability()}"


def numerics_profile(
    device: torch.device,
    tp_size: int = 1,
    tp_invariant: bool = False,
    attention: type[AttentionKind] = CanonicalAttention,
) -> NumericsProfile:
    """The profile of this process on `device`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = f"sm_{major}{minor}"
    else:
        architecture = _cpu_architecture()
    tile, split = attention.tiles(device.type)
    return NumericsProfile(
        device_type=device.type,
        architecture=architecture,
        tp_size=1 if tp_invariant else tp_size,
        tp_invariant=tp_invariant,
        kv_tile=tile,
        kv_split=split,
        attention=attention.name,
    )
