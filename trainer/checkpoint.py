"""Checkpoints: one exact state file per rank and a manifest, written last.

A checkpoint is a folder `step_00000010`. It is made under a temporary name, every file is synced,
the manifest (with each file's digest, and its own) comes last, and a rename makes it visible: a
folder with a manifest is whole, whenever a process was killed. With several ranks all of them save
and load together, in a folder that all of them see.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

import torch

from samebit.kernels.reduce import gather_objects
from samebit.trainer.ranks import place, together

MANIFEST = "manifest.json"
_PREFIX = "step_"


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
        name, count = _state_file(rank), len(self.manifest["files"])
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
        if (found := _file_digest(file)) != expected:
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


def save_checkpoint(
    root: Path, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], keep: int
) -> Path:
    """Write every rank's state and remove all but the newest `keep` checkpoints.

    Raises CheckpointError on every rank, naming the file, if one of them cannot be written; older
    checkpoints are left alone.
    """
    rank, _size = place()
    final = root / f"{_PREFIX}{step:08d}"
    temporary = root / f".{final.name}.tmp"
    try:
        with together(CheckpointError):
            if rank == 0:
                root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(root)
                temporary.mkdir()
        name = _state_file(rank)
        with together(CheckpointError):
            with _new_file(temporary / name) as file:
                torch.save(dict(state), file)
            digest = _file_digest(temporary / name)
        files = dict(gather_objects((name, digest)))
        with together(CheckpointError):
            if rank == 0:
                content = {"step": step, "files": files, **manifest}
                with _new_file(temporary / MANIFEST) as file:
                    file.write(_manifest_text(content).encode())
                _make_visible(temporary, final)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for others
        raise
    if rank == 0:
        for old in list_checkpoints(root)[:-keep]:
            _remove(old.path)
    return final


def _make_visible(temporary: Path, final: Path) -> None:
    _sync_folder(temporary)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    root = final.parent
    for folder in (root, root.parent, root.parent.parent):  # the last two may be as new
        _sync_folder(folder)


def remove_leftovers(root: Path) -> None:
    """Remove what killed saves and removals left under temporary names."""
    for leftover in root.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints under root, oldest first."""
    manifests = root.glob(f"{_PREFIX}*/{MANIFEST}")
    found = [Checkpoint(file.parent, _read_manifest(file)) for file in manifests]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, if there is any."""
    folders = [file.parent for file in root.glob(f"{_PREFIX}[0-9]*/{MANIFEST}")]
    folders.sort(key=lambda folder: int(folder.name.removeprefix(_PREFIX)))
    return read_checkpoint(folders[-1]) if folders else None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The whole checkpoint in this folder, if it holds one."""
    manifest = path / MANIFEST
    whole = path.name.startswith(_PREFIX) and manifest.exists()
    return Checkpoint(path, _read_manifest(manifest)) if whole else None


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        manifest = json.loads(text)
        if not {"step", "files"} <= manifest.keys():
            raise ValueError("step or files missing")
        if text != _manifest_text({k: v for k, v in manifest.items() if k != "digest"}):
            raise ValueError("its digest is another's")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return manifest


def _manifest_text(content: Mapping[str, Any]) -> str:
    """With the digest of the content; a file that holds any other text is damaged."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=2)


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is on the disk when the block is done."""
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch hides the disk's own error behind one about positions in its archive
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"cannot write {path}: {reason}; earlier checkpoints are unharmed"
        ) from error


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
