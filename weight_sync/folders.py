"""Folders of ours: a marker inside says whose they are, a lock who works there, and one that is
replaced is replaced as a whole.

A folder without the marker is somebody else's: nothing of ours removes it.
"""

import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samebit.weight_sync.disk import exchange, make_folder, sync, sync_tree, write_atomically

MARKER = ".samebit"
LOCK = ".samebit.lock"
_FORMAT = 1
_UNFINISHED = "unfinished"
_NO_LOCKS = "this file system has no locks: nothing keeps a second process out of"


class FolderInUseError(RuntimeError):
    """Another process works in the folder."""


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the folder's marker says; None for a folder without one, which is not ours."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "kind" in marker else None


def write_marker(folder: Path, kind: str, **content: Any) -> None:
    """Make the folder ours; a marker that is there is replaced, whatever kills the machine."""
    marker = {"kind": kind, **content, "format": _FORMAT}
    write_atomically(folder / MARKER, json.dumps(marker) + "\n")


class FolderLock:
    """Keeps other processes out of a folder until `release`, or until this process is dead.

    Children never hold it: it closes in those that are executed and in those that are forked.
    Raises FolderInUseError, which names the process that holds it, and OSError.
    """

    def __init__(self, folder: Path, shown: Path | None = None) -> None:
        """shown: the folder that errors name."""
        self._file = folder / LOCK
        descriptor = _take(self._file, shown or folder)
        self._close = weakref.finalize(self, os.close, descriptor)
        _held.add(self)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let others in. A second call does nothing."""
        if self._close.alive:
            self._file.unlink(missing_ok=True)
            self._close()

    def drop(self) -> None:
        """In a forked child: it is the parent's."""
        self._close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _drop_all() -> None:
    for lock in list(_held):
        lock.drop()


os.register_at_fork(after_in_child=_drop_all)


def _take(file: Path, folder: Path) -> int:
    """A descriptor that holds the lock on the file of this name."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 500, 0).decode(errors="replace")
            os.close(descriptor)
            raise FolderInUseError(
                f"{folder} is in use by {holder or 'another process'}: wait until it ends, or give "
                "another folder"
            ) from None
        except OSError as error:
            print(f"samebit: {_NO_LOCKS} {folder} ({error})", file=sys.stderr)
            return descriptor
        with suppress(FileNotFoundError):  # the one before has just released and removed it
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


@contextmanager
def replacing(folder: Path, **content: Any) -> Iterator[Path]:
    """Gives a new folder to fill; at the block's end it takes the place of `folder`, as a whole.

    It is marked as ours, of the kind "model", with `content`. Both stand in a folder of ours beside
    `folder`, under a name that nobody else has, until that is done; what a killed process left
    there is finished or removed. A link is followed. Raises FolderInUseError if another process is
    replacing `folder`.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.samebit-", dir=folder.parent))
    lock = FolderLock(work)
    try:
        write_marker(work, _UNFINISHED, replaces=folder.name)
        _finish_others(folder, work)
        new = work / "new"
        new.mkdir()
        yield new
        write_marker(new, "model", **content)
        sync_tree(work)
        sync(folder.parent)
        _put_in_place(folder, work)
    finally:
        _discard(work)
        lock.release()


def _put_in_place(folder: Path, work: Path) -> None:
    """In one instant. Where the file system cannot exchange two folders, one that is killed in
    between leaves `new` whole and `folder` absent: see _finish_others."""
    new, old = work / "new", work / "old"
    if not (folder.exists() and exchange(new, folder)):
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    sync(folder.parent)


def _discard(work: Path) -> None:
    """The marker goes last: as long as there is something to remove, it says what that is."""
    for name in ("new", "old"):
        shutil.rmtree(work / name, ignore_errors=True)
    with suppress(OSError):
        sync(work)
    shutil.rmtree(work, ignore_errors=True)


def _finish_others(folder: Path, own: Path) -> None:
    """What killed processes left of replacing the same folder."""
    prefix = f".{folder.name}.samebit-"
    for work in sorted(folder.parent.iterdir()):
        marker = read_marker(work) if work.name.startswith(prefix) and work != own else None
        if marker is None or marker != marker | {"kind": _UNFINISHED, "replaces": folder.name}:
            continue
        lock = FolderLock(work, folder)
        if (work / "old").exists() and not folder.exists():
            (work / "new").rename(folder)
            sync(folder.parent)
        _discard(work)
        lock.release()
