"""Checkpoints: one exact state file per rank and a manifest, written last.

A checkpoint is a folder `step_00000010`. It is made under a temporary name, every file is synced,
the manifest (with each file's digest) comes last, and a rename makes it visible: a folder with a
manifest is whole, whenever the process was killed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
_PREFIX = "step_"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return self.manifest["step"]

    def load(self, rank: int = 0) -> dict[str, Any]:
        """This rank's state; CheckpointError if its bytes are not those that were written."""
        name = _state_file(rank)
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise CheckpointError(f"{self.path} holds no state of rank {rank}")
        file = self.path / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        if (found := _file_digest(file)) != expected:
            raise CheckpointError(
                f"{file} is damaged: SHA-256 {found}, the manifest says {expected}"
            )
        return torch.load(file, weights_only=True)

    def require(self, key: str, value: Any, meaning: str) -> None:
        """CheckpointError unless the manifest holds `value` under `key`."""
        if self.manifest.get(key) != value:
            raise CheckpointError(
                f"{self.path} was written under another {meaning}: {self.manifest.get(key)} there, "
                f"{value} here"
            )


def save_checkpoint(
    root: Path, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], keep: int
) -> Path:
    """Write this process's state (rank 0 of 1) and remove all but the newest `keep` checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{_PREFIX}{step:08d}"
    temporary = root / f".{final.name}.tmp"
    for leftover in root.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    name = _state_file(0)
    with (temporary / name).open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    files = {name: _file_digest(temporary / name)}
    with (temporary / MANIFEST).open("w") as file:
        json.dump({"step": step, "files": files, **manifest}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    _sync_folder(root)
    for old in list_checkpoints(root)[:-keep]:
        _remove(old.path)
    return final


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints under root, oldest first."""
    manifests = root.glob(f"{_PREFIX}*/{MANIFEST}")
    found = [Checkpoint(file.parent, _read_manifest(file)) for file in manifests]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, if there is any."""
    found = list_checkpoints(root)
    return found[-1] if found else None


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
        if not {"step", "files"} <= manifest.keys():
            raise ValueError("step or files missing")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return manifest


def _remove(folder: Path) -> None:
    """Hide, then delete: a kill in between leaves no half of a checkpoint behind."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _state_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
