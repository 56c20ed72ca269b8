"""Where a result comes from, told by the program itself: its source, command, device and versions.

The source digest names the program's files wherever the tree lies; a copy without its history can
so be traced to the commit that it was taken from (tests/programs/source_digest.py).
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist

from samebit.recipes.run.secrets import without_secrets
from samebit.weight_sync.disk import write_atomically

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"

# What an installed package holds too: not the shapes that lie beside it.
_SUFFIXES = {
    "kernels": (".py", ".json"), "rollout": (".py",), "weight_sync": (".py",),
    "trainer": (".py",), "recipes": (".py", ".jinja", ".txt"), "configs": (".yaml",),
}  # fmt: skip
_LIBRARIES = {
    "torch": "torch", "triton": "triton", "megatron-core": "megatron.core",
    "transformers": "transformers", "tokenizers": "tokenizers", "safetensors": "safetensors",
    "numpy": "numpy", "reasoning-gym": "reasoning_gym", "flashinfer-python": "flashinfer",
}  # fmt: skip


def _belongs(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES.get(path.parts[0], ())


def program_files(root: Path) -> dict[str, str]:
    """Return the SHA-256 of the program's files under `root` by name."""
    files = (path for folder in _SUFFIXES for path in (root / folder).rglob("*") if path.is_file())
    named = {path.relative_to(root).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if _belongs(name)
    }


STARTED_AS = program_files(ROOT)
"""Taken when the program starts: what is edited while it runs is not what ran."""


def source_digest(files: Mapping[str, str]) -> str:
    """Return SHA-256 over the lines that `sha256sum` prints for the files, in order of names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def run_git(root: Path, *arguments: str) -> bytes:
    """Return what git prints, in the repository at `root` whatever a hook has set."""
    hooked = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, check=True, env=hooked).stdout


def head(root: Path) -> str | None:
    """Return the commit checked out at `root`; None where root is not a checkout's own folder."""
    try:
        where = run_git(root, "rev-parse", "--show-prefix", "--short=12", "HEAD").decode()
    except (OSError, subprocess.CalledProcessError):
        return None
    prefix, commit = where.split("\n")[:2]
    return commit if not prefix else None  # else of a repository that the package lies in


def committed_files(commit: str, root: Path) -> dict[str, str]:
    """Return the program_files of a commit, from the history at `root`."""
    archive = io.BytesIO(run_git(root, "archive", "--format=tar", commit))
    found = {}
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            if _belongs(member.name) and (file := tar.extractfile(member)) is not None:
                found[member.name] = hashlib.sha256(file.read()).hexdigest()
    return found


def source(root: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the digest of `files`, the commit at `root`, and what differs between the two.

    changed_files: those of other bytes, those that only one of them has, untracked ones included;
    None where the commit is unknown.
    """
    commit, changed = head(root), None
    if commit is not None:
        there = committed_files(commit, root)
        both = sorted(files.keys() | there.keys())
        changed = [name for name in both if files.get(name) != there.get(name)]
    return {
        "source_digest": source_digest(files),
        "commit": commit or UNKNOWN,
        "changed_files": changed,
    }


@functools.cache
def _own_source() -> dict[str, Any]:
    return source(ROOT, STARTED_AS)


def _from_elsewhere() -> list[str]:
    """Files of modules that a mixed search path has taken from another tree."""
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("samebit.")]
    files = (Path(file).resolve() for m in loaded if (file := getattr(m, "__file__", None)))
    return sorted(str(file) for file in files if not file.is_relative_to(ROOT))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device.type, "cpu": _cpu_name()}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found |= {"device": f"cuda:{index}", "gpus_visible": torch.cuda.device_count()}
    return found | {"processes": dist.get_world_size() if dist.is_initialized() else 1}


@functools.cache
def _driver() -> str:
    file = Path("/sys/module/nvidia/version")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        if file.exists():
            return file.read_text().strip()
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return UNKNOWN


def _versions(device: torch.device) -> dict[str, str]:
    """Of what this process has imported, and on a GPU of what lies beneath."""
    found = {"python": platform.python_version()}
    for library, module in _LIBRARIES.items():
        if version := getattr(sys.modules.get(module), "__version__", None):
            found[library] = str(version)
    if "reasoning-gym" in found:  # its module names an older version than it is
        found["reasoning-gym"] = importlib.metadata.version("reasoning-gym")
    if "megatron-core" in found:  # it appends the commit of whatever repository it lies in
        found["megatron-core"] = found["megatron-core"].partition("+")[0]
    if device.type == "cuda":
        from samebit.kernels.gpu import cublaslt

        found |= {
            "cuda": str(torch.version.cuda),
            "cublaslt": cublaslt.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver(),
        }
    return found


def provenance(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Return the fields that every result names: `command` as typed, on the device it used."""
    elsewhere = _from_elsewhere()
    return {
        "command": shlex.join(map(without_secrets, command)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_own_source(),
        **({"imported_from_elsewhere": elsewhere} if elsewhere else {}),
        "device": device_name(device),
        "hardware": _hardware(device),
        "versions": _versions(device),
    }


def write_result(
    path: Path, device: torch.device, body: dict[str, Any], command: Sequence[str] = ()
) -> None:
    """Replace a JSON file, in a folder that is made if need be: provenance, then the body.

    command: unset, `samebit` with the words that it was given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = provenance(command or ["samebit", *sys.argv[1:]], device) | body
    write_atomically(path, json.dumps(report, indent=1) + "\n")


def record_start(run_dir: Path, device: torch.device, step: int) -> None:
    """Add a line to the run's provenance.jsonl: what goes on after `step`, by which program."""
    file = run_dir / "provenance.jsonl"
    earlier = file.read_text() if file.exists() else ""
    started = {"after_step": step, **provenance(["samebit", *sys.argv[1:]], device)}
    write_atomically(file, earlier + json.dumps(started) + "\n")
