"""Writing checkpoints, in the background: a thread writes them from a copy in the host's memory.

A checkpoint is made under a temporary name, every file is synced, the manifest comes last, and a
rename makes it visible. With several ranks each of them writes its file, and the first one the rest
once all files are there.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from samebit.kernels.reduce import gather_objects
from samebit.trainer.checkpoint import (
    MANIFEST,
    PREFIX,
    CheckpointError,
    list_checkpoints,
    manifest_text,
    state_file,
)
from samebit.trainer.ranks import is_first, place, together


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    manifest: Mapping[str, Any]
    temporary: Path
    digest: Future[str]
    """Of this rank's file, once that is on the disk."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and keeps the newest `keep`.

    All ranks call the same methods in the same order. Each raises CheckpointError on every rank,
    naming the file, if one of them cannot write; older checkpoints are left alone then.
    """

    def __init__(self, root: Path, keep: int, background: bool = True) -> None:
        self._root = root
        self._keep = keep
        self._background = background
        self._copy: Any = None  # of the state, in memory that is used again
        self._pending: _Pending | None = None

    def save(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Begin to write every rank's state, which may change afterwards; without a background,
        write it. What was begun before is finished first."""
        self.finish()
        temporary = self._root / f".{PREFIX}{step:08d}.tmp"
        with _removed_if_it_fails(temporary), together(CheckpointError):
            if is_first():
                self._root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._root)
                temporary.mkdir()
        if self._background:
            state = self._copy = host_copy(state, self._copy)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        executor = ThreadPoolExecutor(1, "checkpoint")
        digest = executor.submit(self._write, step, state, manifest, temporary)
        executor.shutdown(wait=False)
        self._pending = _Pending(step, manifest, temporary, digest)
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """Finish what was begun if that takes no waiting."""
        if self._pending and all(gather_objects(self._pending.digest.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is whole."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        rank, size = place()
        with _removed_if_it_fails(pending.temporary):
            with together(CheckpointError):
                digest = pending.digest.result()
            if size > 1:
                files = dict(gather_objects((state_file(rank), digest)))
                with together(CheckpointError):
                    if is_first():
                        self._publish(pending.step, files, pending.manifest, pending.temporary)

    def wait(self) -> None:
        """After an error, which others may not know of: let this rank's thread end. What a rank
        alone has begun is whole then; what several have begun may be lost."""
        if self._pending is not None:
            wait([self._pending.digest])

    def _write(
        self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], temporary: Path
    ) -> str:
        """The thread: this rank's file; a rank alone needs nobody for the rest."""
        rank, size = place()
        with _new_file(temporary / state_file(rank)) as file:
            hashed = _Hashed(file)
            torch.save(dict(state), hashed)
        digest = hashed.sha256.hexdigest()
        if size == 1:
            self._publish(step, {state_file(rank): digest}, manifest, temporary)
        return digest

    def _publish(
        self, step: int, files: dict[str, str], manifest: Mapping[str, Any], temporary: Path
    ) -> None:
        """Write the manifest, make the checkpoint visible, remove the oldest."""
        with _new_file(temporary / MANIFEST) as file:
            file.write(manifest_text({"step": step, "files": files, **manifest}).encode())
        _sync_folder(temporary)
        final = self._root / f"{PREFIX}{step:08d}"
        if final.exists():
            _remove(final)
        os.replace(temporary, final)
        for folder in (self._root, *list(self._root.parents)[:2]):  # the last two may be as new
            _sync_folder(folder)
        for old in list_checkpoints(self._root)[: -self._keep]:
            _remove(old.path)


def host_copy(value: Any, last: Any) -> Any:
    """A copy of nested dicts, lists and tensors with all tensors in the CPU's memory.

    last: an earlier copy, whose memory is used again where shapes and dtypes are the same; the
    device copies asynchronously.
    """
    if isinstance(value, torch.Tensor):
        fits = isinstance(last, torch.Tensor) and (last.shape, last.dtype) == (
            value.shape,
            value.dtype,
        )
        if not fits:
            last = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return last.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        known = last if isinstance(last, Mapping) else {}
        return {key: host_copy(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item, None) for item in value)
    return value


def remove_leftovers(root: Path) -> None:
    """Remove what killed saves and removals left under temporary names."""
    for leftover in root.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)


class _Hashed:
    """A file that is written from its start to its end, and the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _removed_if_it_fails(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for others
        raise


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


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
