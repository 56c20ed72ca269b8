"""Weights that change without a trainer, and engines that take them by samebit's own transports."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.named import import_class
from samebit.rollout.config import EngineConfig
from samebit.rollout.engine import Engine
from samebit.rollout.remote import RemoteEngine
from samebit.weight_sync.digest import Digester
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.transports.base import Lease, WeightSync
from samebit.weight_sync.transports.registry import TRANSPORTS
from samebit.weight_sync.types import WeightVersion

_FACTORS = (2.0, 0.5)  # exact


@dataclass
class Source:
    """A WeightSource without a trainer: two versions of all parameters, which take turns."""

    params: Mapping[str, Tensor]
    specs: list[ParamSpec]
    step: int = 0
    rows: slice = slice(None)
    """Of every parameter, which alone change."""

    @property
    def device(self) -> torch.device:
        """Where all parameters lie."""
        return next(iter(self.params.values())).device

    @property
    def num_bytes(self) -> int:
        """Of all parameters."""
        return sum(p.nbytes for p in self.params.values())

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """There is none: raises ValueError."""
        raise ValueError("a source without a trainer is no stage of a pipeline")

    @cached_property
    def _digester(self) -> Digester:
        return Digester(self.specs, self.params)

    @property
    def version(self) -> WeightVersion:
        """Step and digest of the present weights."""
        return WeightVersion(self.step, self._digester.digest())

    def change(self) -> None:
        """Make the next step's weights in place; after two of them every bit is as before."""
        changing = [param[self.rows] for param in self.params.values()]
        torch._foreach_mul_(changing, _FACTORS[self.step % 2])
        self.step += 1


def why_not_here(transport: str, device: torch.device, engines: int = 1, trainers: int = 1) -> str:
    """What keeps one of TRANSPORTS from working between so many processes of this machine and so
    many of engines; "": nothing."""
    entry, gpus = TRANSPORTS[transport], 0
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
    if "one" not in entry.trainers:
        return f"{transport} is for trainers of several processes"
    needed = trainers + engines if entry.gpus > 1 else entry.gpus
    missing = f"{transport} needs CUDA devices: {needed}, there are {gpus}"
    return missing if needed > gpus else ""


def engine_device(
    transport: str, device: torch.device, place: int = 0, trainers: int = 1
) -> torch.device:
    """Where an engine's process of a place, among all of engines, lives that gets its weights so:
    on the sender's device, or on a GPU behind this machine's trainers if the transport is between
    two."""
    apart = transport in TRANSPORTS and TRANSPORTS[transport].gpus > 1
    return torch.device("cuda", trainers + place) if apart else device


def connect(
    transport: str,
    source: Source,
    model_path: str | Path,
    config: EngineConfig,
    folder: Path,
    cpu_threads: int = 1,
    **settings: Any,
) -> tuple[Engine | RemoteEngine, WeightSync]:
    """An engine that serves after its first update by one of TRANSPORTS, and what brings that.

    It is in this process if it can be, else in one of its own. settings: those of the transport's
    Entry.
    """
    entry, config = TRANSPORTS[transport], replace(config, load_format="none")
    kind = import_class(entry.path, "transport", WeightSync)
    engine: Engine | RemoteEngine
    if "colocated" in entry.engines:
        shared: dict[str, Any] = {}
        if issubclass(kind, Lease):
            shared = {"weights": source.params, "step": source.step}
        engine = Engine(model_path, config, device=source.device, **shared)
    else:
        torch.cuda.empty_cache()  # what this process keeps for later may be what that one needs
        device = engine_device(transport, source.device)
        engine = RemoteEngine(model_path, cpu_threads, config=config, device=device)
    return engine, kind.between(source, engine, folder, **settings)
