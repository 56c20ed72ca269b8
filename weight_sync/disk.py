"""What outlives a power failure: files and names are on the disk when these calls return.

A file's bytes are on the disk once it is synced, its name once the folder that holds it is.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

_HERE = -100  # AT_FDCWD: paths are taken as they are
_EXCHANGE = 2  # RENAME_EXCHANGE


def sync(path: Path) -> None:
    """The bytes of a file, or the names in a folder, where its file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """All that is in a folder, but not the folder's own name."""
    for entry in folder.rglob("*"):
        if not entry.is_symlink():
            sync(entry)
    sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    The names of all of them are on the disk then, whoever has made them, and when.
    """
    path.mkdir(parents=True, exist_ok=True)
    for folder in path.resolve().parents:
        with suppress(PermissionError):  # not ours to read, so not ours to make
            sync(folder)
        if folder.is_mount():
            break


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace a file: at any moment, also after a kill or a power failure, it holds the old content
    or the new, and the new once this returns.

    Its mode is `mode` less the umask, from the first byte on. Raises OSError, which names the file.
    """
    temporary = path.with_name(f".{path.name.removeprefix('.')}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a kill left may have another mode
        with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def naming_file[T: (str, bytes)](file: IO[T]) -> Iterator[IO[T]]:
    """Name the file in the errors of writing to it, as when the disk is full."""
    with naming_path(file.name):
        yield file


@contextmanager
def naming_path(path: str | Path) -> Iterator[None]:
    """Name a file or folder in the errors of writing there, where they name none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one instant; False, and nothing is changed, where the file system or
    the kernel does not do that. Raises OSError for everything else."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))
