"""Writing checkpoints, in the background: a thread writes them from a copy in the host's memory.

A checkpoint is made under a temporary name, every file is synced, the manifest comes last, and a
rename makes it visible. With several ranks each of them writes its file and a digest beside it; the
first one's thread writes the rest once all digests are there.
"""

import hashlib
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from samebit.trainer.checkpoint import (
    MANIFEST,
    NAME,
    CheckpointError,
    checkpoint_folders,
    folder_name,
    manifest_text,
    read_checkpoint,
    state_file,
)
from samebit.trainer.ranks import is_first, place, together
from samebit.weight_sync.disk import exchange, make_folder, sync
from samebit.weight_sync.objects import gather_objects

_LEFTOVER = re.compile(rf"\.{NAME.pattern}\.(tmp|old)")
_LOOK_S = 0.02
_OTHERS_S = 20.0  # less than a launcher leaves the others


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    temporary: Path
    file: Future[None]
    """This rank's file, and its digest beside it."""
    whole: Future[None] | None
    """On the first rank: the checkpoint, once every rank's file is there."""
    given_up: threading.Event

    @property
    def state(self) -> str:
        """busy, failed or done."""
        if self.file.done() and self.file.exception() is not None:
            return "failed"
        parts = [self.file] if self.whole is None else [self.file, self.whole]
        return "done" if all(part.done() for part in parts) else "busy"


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and keeps the newest `keep`.

    All ranks call the same methods (but `close`) in the same order. Each raises CheckpointError on
    every rank, naming the file, if one of them cannot write; older checkpoints are left alone then.
    """

    def __init__(self, root: Path, keep: int, background: bool = True) -> None:
        self._root = root
        self._keep = keep
        self._background = background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copy: Any = None  # of the state, in memory that is used again
        self._pending: _Pending | None = None

    def save(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Begin to write every rank's state, which may change afterwards; without a background,
        write it. What was begun before is finished first."""
        self.finish()
        temporary = self._root / f".{folder_name(step)}.tmp"
        rank, size = place()
        with _removed_if_it_fails(temporary), together(CheckpointError):
            if rank == 0:
                make_folder(self._root)
                remove_leftovers(self._root)
                temporary.mkdir()
            if self._background:
                state = self._copy = _copied(state, self._copy)
        given_up = threading.Event()
        file = self._thread.submit(_write_file, state, temporary, rank)
        whole = None
        if rank == 0:
            whole = self._thread.submit(self._publish, step, manifest, temporary, size, given_up)
        self._pending = _Pending(temporary, file, whole, given_up)
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """Finish what was begun if that takes no waiting, or has failed."""
        if self._pending is not None:
            states = gather_objects(self._pending.state)
            if "failed" in states or "busy" not in states:
                self.finish()

    def finish(self) -> None:
        """Wait until what was begun is whole."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with _removed_if_it_fails(pending.temporary):
                with together(CheckpointError):
                    pending.file.result()
                with together(CheckpointError):
                    if pending.whole is not None:
                        pending.whole.result()
        finally:
            pending.given_up.set()

    def close(self) -> None:
        """After an error, which other ranks may not know of: let what was begun become whole, if
        the other ranks' files are there soon, and say so if it cannot."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.file.exception()  # waits
        if error is None and pending.whole is not None:
            wait([pending.whole], timeout=_OTHERS_S)
        pending.given_up.set()
        if pending.whole is not None:  # it ends now
            error = error or pending.whole.exception()
        if error is not None:
            print(f"samebit: {error}", file=sys.stderr)
            if pending.whole is not None:
                shutil.rmtree(pending.temporary, ignore_errors=True)

    def _publish(
        self,
        step: int,
        manifest: Mapping[str, Any],
        temporary: Path,
        size: int,
        given_up: threading.Event,
    ) -> None:
        """The first rank's thread: once every rank's digest is there, write the rest."""
        digests = [_digest_file(temporary, rank) for rank in range(size)]
        while not all(digest.exists() for digest in digests):
            if given_up.wait(_LOOK_S):
                raise CheckpointError(f"{temporary}: another rank's file is missing")
        files = {state_file(rank): digest.read_text() for rank, digest in enumerate(digests)}
        with _new_file(temporary / MANIFEST) as file:
            file.write(manifest_text({"step": step, "files": files, **manifest}).encode())
        for digest in digests:
            digest.unlink()
        sync(temporary)
        _make_visible(temporary, self._root / folder_name(step))
        for old in [f for f in checkpoint_folders(self._root) if _is_own(f)][: -self._keep]:
            _remove(old)


def _write_file(state: Mapping[str, Any], temporary: Path, rank: int) -> None:
    """The thread: a rank's file; then, for the first rank, its digest."""
    with _new_file(temporary / state_file(rank)) as file:
        hashed = _Hashed(file)
        torch.save(dict(state), cast(IO[bytes], hashed))
    digest = _digest_file(temporary, rank)
    with _new_file(digest.with_suffix(".tmp")) as file:
        file.write(hashed.sha256.hexdigest().encode())
    digest.with_suffix(".tmp").replace(digest)


def _digest_file(temporary: Path, rank: int) -> Path:
    return temporary / f"{state_file(rank)}.sha256"


def _copied(state: Mapping[str, Any], last: Any) -> Any:
    """The state in the host's memory, complete."""
    try:
        copy = host_copy(state, last)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise CheckpointError(
            f"no copy of the state in the host's memory: {error}; with "
            "trainer.background_checkpoints=false none is made"
        ) from error
    return copy


def host_copy(value: Any, last: Any) -> Any:
    """A copy of nested dicts, lists and tensors with all tensors in the CPU's memory.

    last: an earlier copy, whose memory is used again where shapes and dtypes are the same; the
    device copies asynchronously.
    """
    if isinstance(value, Tensor):
        fits = isinstance(last, Tensor) and (last.shape, last.dtype) == (value.shape, value.dtype)
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
    """Remove what killed saves and removals left under temporary names, and nothing else."""
    for leftover in root.iterdir():
        own = _LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink()
        if own and leftover.is_dir():
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


def _make_visible(temporary: Path, final: Path) -> None:
    """An earlier one of the same step gives way in the same instant."""
    if not _is_own(final):
        _move_aside(final)
    elif exchange(temporary, final):
        sync(final.parent)
        shutil.rmtree(temporary)
        return
    else:  # the file system cannot do that: for an instant there is none of this step
        _remove(final)
    os.replace(temporary, final)
    sync(final.parent)


def _remove(folder: Path) -> None:
    """Hide, then delete: a kill in between leaves no half of a checkpoint behind."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    sync(hidden.parent)
    shutil.rmtree(hidden)


def _is_own(folder: Path) -> bool:
    """Whether a run has written this very folder: only those are removed."""
    try:
        checkpoint = None if folder.is_symlink() else read_checkpoint(folder)
    except CheckpointError:  # damaged
        return False
    return checkpoint is not None and folder.name == folder_name(checkpoint.step)


def _move_aside(other: Path) -> None:
    """What no run has written, a link or a file, may be of use to somebody: it is renamed."""
    if not os.path.lexists(other):
        return
    names = (other.with_name(f"{other.name}.aside{n or ''}") for n in itertools.count())
    free = next(name for name in names if not os.path.lexists(name))
    other.rename(free)
    print(f"samebit: {other} was no checkpoint of a run; it is {free.name} now", file=sys.stderr)
