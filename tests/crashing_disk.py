"""A disk that loses power: what writers do to a folder is recorded, and every crash is replayed.

While it records, each call that opens, renames, removes or syncs is one instant; what other code
(safetensors, say) has written meanwhile is found by looking, and counts as written, not as synced.
A file's bytes are safe once it was synced, a name once its folder was; of the rest a crash keeps or
loses what POSIX lets it, see `crashes`. Nothing is really synced, so recording is fast.
"""

import builtins
import io
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CALLS = ((builtins, "open"), (io, "open"), (os, "open"), (os, "mkdir"), (os, "rmdir")) + (
    (os, "rename"), (os, "replace"), (os, "unlink"), (os, "remove"), (os, "link"), (os, "symlink"),
    (os, "truncate"), (os, "ftruncate"),
)  # fmt: skip
ROOT = 0
_FOLDER = None
Names = dict[tuple[int, str], int | None]
"""(folder, name) -> what stands there now; None for nothing."""
Content = bytes | Path | None
"""Of a file, of a link, of a folder."""
Tree = dict[str, Content]


@dataclass(frozen=True)
class Crash:
    """One state that the disk may be in after a crash."""

    folder: Path
    reported: list[str]
    """What was reported as done before the crash."""
    what: str
    """The instant and what was lost, for messages."""


@dataclass
class _State:
    """What is visible, and what of it is safe, between two instants."""

    safe: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    pending: list[Names] = field(default_factory=list)
    """Changes of names that are not safe yet, in order; each is kept or lost as a whole."""
    contents: dict[int, Content] = field(default_factory=lambda: {ROOT: _FOLDER})
    synced: dict[int, Content] = field(default_factory=lambda: {ROOT: _FOLDER})
    reported: list[str] = field(default_factory=list)

    def apply(self, event: tuple[str, Any]) -> None:
        kind, value = event
        if kind == "names":
            self.pending.append(value)
        elif kind == "content":
            thing, content = value
            self.contents[thing] = content
            if not isinstance(content, bytes):
                self.synced[thing] = content
            self.synced.setdefault(thing, b"")
        elif kind == "reported":
            self.reported.append(value)
        elif self.contents[value] is _FOLDER:
            for change in [p for p in self.pending if any(at == value for at, _ in p)]:
                _change(self.safe, change)
                self.pending.remove(change)
        else:
            self.synced[value] = self.contents[value]

    def trees(self, kinds: Collection[str]) -> Iterator[tuple[str, Tree]]:
        """What may be found after a crash, with all names first."""
        folders = {at for change in self.pending for at, _ in change}
        kept = [(f"{n} names kept", self.pending[:n]) for n in range(len(self.pending), -1, -1)]
        for folder in sorted(folders):
            here = [p for p in self.pending if any(at == folder for at, _ in p)]
            kept += [(f"{n} names of one folder kept", here[:n]) for n in range(1, len(here) + 1)]
        removals = [p for p in self.pending if set(p.values()) == {None}]
        kept += [("one removal kept", [removal]) for removal in removals]
        for names, changes in kept:
            for kind in kinds:
                yield f"{names}, bytes {kind}", self._tree(changes, _BYTES[kind])

    def _tree(self, changes: list[Names], hold: Callable[[bytes, bytes], bytes]) -> Tree:
        names = {folder: dict(entries) for folder, entries in self.safe.items()}
        for change in changes:
            _change(names, change)
        found: Tree = {}

        def walk(folder: int, prefix: str) -> None:
            for name, thing in names.get(folder, {}).items():
                now, safe = self.contents[thing], self.synced[thing]
                both = isinstance(now, bytes) and isinstance(safe, bytes) and now != safe
                found[prefix + name] = hold(safe, now) if both else now
                if now is _FOLDER:
                    walk(thing, f"{prefix}{name}/")

        walk(ROOT, "")
        return found


def _change(names: dict[int, dict[str, int]], change: Names) -> None:
    for (folder, name), thing in change.items():
        if thing is None:
            names.setdefault(folder, {}).pop(name, None)
        else:
            names.setdefault(folder, {})[name] = thing


def _half(safe: bytes, now: bytes) -> bytes:
    """As far as the two agree, and half of the rest."""
    same = len(os.path.commonprefix([safe, now]))
    return now[: same + (len(now) - same) // 2]


def _zeros(safe: bytes, now: bytes) -> bytes:
    """The new length without the new bytes, as some file systems show it."""
    same = len(os.path.commonprefix([safe, now]))
    return now[:same] + bytes(len(now) - same)


_BYTES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "kept": lambda _safe, now: now,
    "lost": lambda safe, _now: safe,
    "torn": _half,
    "zeroed": _zeros,
}


class CrashingDisk:
    """A folder to record in; what is in it when the recording begins is safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events: list[tuple[str, Any]] = []
        self._known: dict[tuple[int, int], int] = {}  # inodes that are there
        self._names: dict[tuple[int, str], int] = {}
        self._contents: dict[int, Content] = {ROOT: _FOLDER}
        self._count, self._first = ROOT, 0
        self._lock = threading.RLock()
        self._looking = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this process does in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._look()
        self._events += [("sync", thing) for thing in self._contents]
        self._first = len(self._events)
        originals = [(owner, name, getattr(owner, name)) for owner, name in _CALLS]
        fsync = os.fsync
        try:
            for owner, name, original in originals:
                setattr(owner, name, self._recorded(original))
            os.fsync = self._fsync  # type: ignore[assignment]
            yield
        finally:
            os.fsync = fsync
            for owner, name, original in originals:
                setattr(owner, name, original)
            self._look()

    def report(self, what: str) -> None:
        """A writer has returned: from here on its work may not be lost."""
        self._look()
        self._events.append(("reported", what))

    def crashes(self, folder: Path, kinds: Collection[str] = tuple(_BYTES)) -> Iterator[Crash]:
        """Every different state after a crash at any instant since the recording began, made in a
        folder of its own under `folder`: any first part of the unsafe names kept, or of those of
        one folder, or one removal alone; unsafe bytes kept, lost, torn or zeroed, or as `kinds`
        says."""
        state, seen = _State(), set[Any]()
        for event in self._events[: self._first]:
            state.apply(event)
        for number, event in enumerate(self._events[self._first :]):
            state.apply(event)
            for what, tree in state.trees(kinds):
                key = (len(state.reported), frozenset(tree.items()))
                if key not in seen:
                    seen.add(key)
                    made = folder / f"{len(seen):05d}"
                    _make(made, tree)
                    yield Crash(made, [*state.reported], f"{made}: instant {number}, {what}")

    def _recorded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._look()
                try:
                    return original(*args, **kwargs)
                finally:
                    self._look()

        return call

    def _fsync(self, descriptor: int) -> None:
        with self._lock:
            self._look()
            thing = self._known.get(_inode(os.fstat(descriptor)))
            if thing is not None:
                self._events.append(("sync", thing))

    def _look(self) -> None:
        """Record what has changed since the last look: new contents, then names, at one instant."""
        with self._lock:
            if self._looking:  # its own calls
                return
            self._looking = True
            try:
                self._compare()
            finally:
                self._looking = False

    def _compare(self) -> None:
        names: dict[tuple[int, str], int] = {}
        contents: dict[int, Content] = {ROOT: _FOLDER}
        known = {_inode(self.folder.stat()): ROOT}
        stack = [(ROOT, self.folder)]
        while stack:
            at, folder = stack.pop()
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                inode = _inode(entry.stat(follow_symlinks=False))
                thing = self._known.get(inode, known.get(inode))
                if thing is None:
                    thing = self._count = self._count + 1
                known[inode], names[at, entry.name] = thing, thing
                contents[thing] = _read(entry)
                if contents[thing] is _FOLDER:
                    stack.append((thing, Path(entry.path)))
        for thing, content in contents.items():
            if thing not in self._contents or self._contents[thing] != content:
                self._events.append(("content", (thing, content)))
        change = {at: names.get(at) for at in names.keys() | self._names.keys()}
        change = {at: thing for at, thing in change.items() if thing != self._names.get(at)}
        if change:
            self._events.append(("names", dict(sorted(change.items()))))
        self._known, self._names, self._contents = known, names, contents


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read(entry: os.DirEntry[str]) -> Content:
    if entry.is_symlink():
        return Path(os.readlink(entry.path))
    if entry.is_dir():
        return _FOLDER
    with suppress(FileNotFoundError):
        return _bytes(entry.path)
    return b""


def _bytes(path: str) -> bytes:
    descriptor = _os_open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 30)
    finally:
        os.close(descriptor)


_os_open = os.open


def _make(folder: Path, tree: Tree) -> None:
    folder.mkdir(parents=True)
    for name, content in tree.items():
        place = folder / name
        if content is _FOLDER:
            place.mkdir()
        elif isinstance(content, Path):
            place.symlink_to(content)
        else:
            place.write_bytes(content)
