"""What outlives a power failure: files and names are on the disk when these calls return.

A file's bytes are on the disk once it is synced, its name once the folder that holds it is.
"""

import ctypes
import errno
import os
from pathlib import Path

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
    """A folder and those above it, where they are missing."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one instant; False, and nothing is changed, where that cannot be done:
    not every file system does it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and not renameat2(
        _HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE
    )
