"""Checkpoints: one exact state file per rank and a manifest, written last.

A checkpoint is a folder `step_00000010`; one with a manifest (which has each file's digest, and its
own) is whole: see trainer/checkpoint_writer.py. Copies and links beside them, under other names,
are the user's. With several ranks all of them load together, in a folder that all of them see.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from samebit.trainer.ranks import place

MANIFEST = "manifest.json"
NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]
    verified: bool = False

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return self.manifest["step"]

    def verify(self) -> Self:
        """Read every file: CheckpointError unless their bytes are those that were written."""
        for name in self.manifest["files"]:
            self._verify_file(name)
        return replace(self, verified=True)

    def load(self) -> dict[str, Any]:
        """This rank's state, verified, in the CPU's memory.

        CheckpointError for another number of ranks.
        """
        rank, size = place()
        name, count = state_file(rank), len(self.manifest["files"])
        if name not in self.manifest["files"] or count != size:
            raise CheckpointError(
                f"{self.path} was written by {count} processes; there are {size} here"
            )
        return self._read(name)

    def load_all(self) -> Iterator[dict[str, Any]]:
        """Every rank's state in turn, verified, in the CPU's memory."""
        for name in self.manifest["files"]:
            yield self._read(name)

    def _read(self, name: str) -> dict[str, Any]:
        if not self.verified:
            self._verify_file(name)
        return torch.load(self.path / name, map_location="cpu", mmap=True, weights_only=True)

    def _verify_file(self, name: str) -> None:
        file, expected = self.path / name, self.manifest["files"][name]
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{file} is damaged: SHA-256 {found}, the manifest says {expected}"
            )

    def require(self, key: str, value: Any, meaning: str) -> None:
        """CheckpointError unless the manifest holds `value` under `key`."""
        if self.manifest.get(key) != value:
            raise CheckpointError(
                f"{self.path} was written under another {meaning}: {self.manifest.get(key)} there, "
                f"{value} here"
            )


def folder_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders of the whole checkpoints that a run has written under root, oldest first."""
    found = {
        int(name[1]): entry
        for entry in (root.iterdir() if root.is_dir() else ())
        if (name := NAME.fullmatch(entry.name))
        and entry.is_dir()
        and not entry.is_symlink()
        and (entry / MANIFEST).exists()
    }
    return [found[step] for step in sorted(found)]


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints under root, oldest first."""
    return [_read_own(folder) for folder in checkpoint_folders(root)]


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, if there is any."""
    folders = checkpoint_folders(root)
    return _read_own(folders[-1]) if folders else None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The whole checkpoint in this folder, whatever its name, if it holds one."""
    manifest = path / MANIFEST
    return Checkpoint(path, _read_manifest(manifest)) if manifest.exists() else None


def _read_own(folder: Path) -> Checkpoint:
    """CheckpointError for a copy of another step's checkpoint."""
    checkpoint = Checkpoint(folder, _read_manifest(folder / MANIFEST))
    if folder.name != folder_name(checkpoint.step):
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {checkpoint.step}: rename it to "
            f"{folder_name(checkpoint.step)}, or to another name than step_<number> if it is a copy"
        )
    return checkpoint


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        manifest = json.loads(text)
        if not {"step", "files"} <= manifest.keys():
            raise ValueError("step or files missing")
        if text != manifest_text({k: v for k, v in manifest.items() if k != "digest"}):
            raise ValueError("its digest is another's")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return manifest


def manifest_text(content: Mapping[str, Any]) -> str:
    """With the digest of the content; a file that holds any other text is damaged."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=2)


def state_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.pt"
