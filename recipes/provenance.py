"""Where a result comes from: command, commit, device and versions, for every result file."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "megatron-core", "transformers", "numpy")


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if named := os.environ.get("SAMEBIT_COMMIT"):
        return named  # a copy of the tree without its history
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def provenance(command: list[str]) -> dict[str, Any]:
    """The fields that every committed result names."""
    return {
        "command": " ".join(command),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
