"""A run's folder: whose it is, who works in it, and how a new run takes an earlier one's place.

The marker .samebit says which command made the folder, the lock .samebit.lock that a process works
in it. A new run first moves what is there into a folder inside (with overwrite=true an earlier run,
else nothing) and removes that only once it has started: its weights are read, its engine serves
them, its files are open. If it cannot start, the earlier run is put back. The marker says how far
that is, so whatever kills a process, the next one that opens the folder ends it:

    moving    the earlier run's files are here or there: back with them
    starting  they are there, what is here is the new run's: remove it, then as above
    started   the new run stands: remove the earlier one
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from samebit.recipes.config import ConfigError
from samebit.weight_sync.disk import make_folder, sync
from samebit.weight_sync.folders import LOCK, MARKER, FolderLock, read_marker, write_marker

CONFIG_FILE = "config.yaml"
# What a run replaces from its start on: where no run of ours is, these are somebody else's.
_WRITTEN = (
    CONFIG_FILE, "metrics.jsonl", "provenance.jsonl", "samples.jsonl", "schedule.jsonl",
    "summary.json", "report.html",
)  # fmt: skip

InputFiles = Iterable[tuple[str, Path]]
"""Keys of the configuration, each with a file that the run is to read."""


class RunFolder:
    """Makes, if need be, and locks the folder of one run of a command.

    Use: make it, check what is to be resumed, `begin`, set up, `started`; `close` in any case.
    Raises FolderInUseError, and OSError if the folder cannot be written.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self._command = command
        self._pid = os.getpid()  # a forked child that unwinds this stack owns nothing
        with naming(path):
            self._made = not path.exists()
            if self._made and path.is_symlink():
                raise OSError(f"it is a link to {path.readlink()}, which does not exist")
            make_folder(path)
            self._lock = FolderLock(path)
        # What was there before the first run: not ours to remove.
        self._foreign: list[str] = (read_marker(path) or {}).get("foreign", [])
        try:
            self._recover()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def begin(self, *, resume: bool, overwrite: bool, inputs: InputFiles = ()) -> None:
        """Make the folder this run's. Raises FileExistsError or ConfigError, before anything is
        changed, if it may not be."""
        require_free(self.path, self._command, resume=resume, overwrite=overwrite, inputs=inputs)
        marker = read_marker(self.path)
        if resume and marker is None:
            self._foreign = [entry.name for entry in self._entries()]
            self._write(self._command)
        if resume:
            return
        if marker is not None and marker["command"] != self._command and self._entries():
            print(
                f"samebit: {self.path} holds a run of `samebit {marker['command']}`, which "
                f"overwrite=true removes once the new one has started",
                file=sys.stderr,
            )
        name = f".earlier-{secrets.token_hex(4)}"
        with naming(self.path):
            self._mark(name, "moving", marker)
            (self.path / name).mkdir()
            sync(self.path)
            for entry in self._entries(name):
                entry.rename(self.path / name / entry.name)
            sync(self.path / name)  # before the names that they had are gone
            self._mark(name, "starting", marker)

    def started(self) -> None:
        """Remove the earlier run, as the new one stands. A second call does nothing."""
        replacing = self._replacing()
        if replacing is not None:
            self._mark(replacing["folder"], "started", replacing["earlier"])
            self._recover()

    def close(self) -> None:
        """Let others in; a run that has not started gives way to the earlier one."""
        if self._pid != os.getpid():
            return
        try:
            self._recover()
        except OSError as error:
            print(
                f"samebit: what was in {self.path} could not be put back ({error}); the next run "
                "there tries again",
                file=sys.stderr,
            )
        self._lock.release()
        if self._made:
            with suppress(OSError):  # it is in use
                self.path.rmdir()

    def _entries(self, *but: str) -> list[Path]:
        """What runs have made in the folder, besides marker and lock."""
        return entries(self.path, *self._foreign, *but)

    def _replacing(self) -> dict[str, Any] | None:
        return (read_marker(self.path) or {}).get("replacing")

    def _mark(self, folder: str, state: str, earlier: dict[str, Any] | None) -> None:
        replacing = {"folder": folder, "state": state, "earlier": earlier}
        self._write(self._command, replacing=replacing)

    def _write(self, command: str, **content: Any) -> None:
        foreign = {"foreign": self._foreign} if self._foreign else {}
        write_marker(self.path, "run", command=command, **foreign, **content)

    def _recover(self) -> None:
        """End what was begun: see the module."""
        replacing = self._replacing()
        if replacing is None:
            return
        folder, earlier = self.path / replacing["folder"], replacing["earlier"]
        if replacing["state"] == "started":
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                self._write((read_marker(self.path) or {})["command"])
            return
        if replacing["state"] == "starting":
            for entry in self._entries(folder.name):
                _remove(entry)
            self._mark(folder.name, "moving", earlier)
        for entry in entries(folder) if folder.exists() else ():
            entry.rename(self.path / entry.name)
        if folder.exists():
            sync(self.path)
            folder.rmdir()
        if earlier is None:
            (self.path / MARKER).unlink()
        else:
            self._write(earlier["command"])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the run's folder in the errors of writing to it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"the run's folder {path} cannot be written: {error}") from error


def standing_run(path: Path) -> tuple[int, int] | None:
    """Tell the runs apart that stand in a folder one after another; None where there is none, or
    one that is to take an earlier one's place and has not started."""
    replacing = (read_marker(path) or {}).get("replacing") or {"state": "started"}
    with suppress(OSError):
        if replacing["state"] == "started":
            found = (path / CONFIG_FILE).stat()  # a run writes its own, and a move keeps it
            return found.st_ino, found.st_mtime_ns
    return None


def entries(folder: Path, *but: str) -> list[Path]:
    """Return what is in a folder besides our marker and lock, and these names."""
    own = {MARKER, f"{MARKER}.tmp", LOCK, *but}
    return [entry for entry in sorted(folder.iterdir()) if entry.name not in own]


def require_free(
    path: Path, command: str, *, resume: bool, overwrite: bool, inputs: InputFiles = ()
) -> None:
    """Check whether a run may begin in this folder. Changes nothing.

    Raises FileExistsError for a folder in use or in other hands, ConfigError for one that holds
    what the run is to read.
    """
    found = entries(path) if path.is_dir() else []
    marker = read_marker(path)
    is_run = marker is not None and marker["kind"] == "run"
    if resume:
        _require_resumable(path, command, marker)
    elif not found:
        return
    elif not overwrite:
        raise FileExistsError(
            f"{path} is not empty; give resume=true to go on with its run, another run_name, or "
            "overwrite=true"
        )
    elif not is_run:
        raise FileExistsError(
            f"{path} holds no {MARKER} of a run: no run made it, so overwrite=true removes "
            "nothing; give another run_name, or remove it yourself"
        )
    else:
        require_outside(path, inputs, "which overwrite=true removes")


def _require_resumable(path: Path, command: str, marker: dict[str, Any] | None) -> None:
    if marker is None:
        foreign = [name for name in _WRITTEN if os.path.lexists(path / name)]
        if foreign:
            raise FileExistsError(
                f"{path / foreign[0]} exists, but {path} holds no {MARKER} of a run, so there is "
                "none to go on with; give another run_name"
            )
    elif (marker["kind"], marker.get("command")) != ("run", command):
        what = f"a run of `samebit {marker['command']}`" if "command" in marker else "a model"
        raise FileExistsError(
            f"{path} holds {what}, so `samebit {command}` cannot go on there; give another run_name"
        )


def require_outside(folder: Path, inputs: InputFiles, why: str) -> None:
    """Raise ConfigError if one of the files lies in the folder, wherever links lead, or if a link
    on the way to it does."""
    root = folder.resolve()
    for key, file in inputs:
        if any(place.is_relative_to(root) for place in _places(file)):
            raise ConfigError(f"{key} is to be read from {file}, which lies in {folder}, {why}")


def _places(file: Path) -> Iterator[Path]:
    """Where a file lies, and where each link lies through which it is reached."""
    yield file.resolve()
    for part in (file, *file.parents):
        if part.is_symlink():
            place = part.parent.resolve() / part.name
            yield place
            yield from _places(place.parent / place.readlink())


def is_overwritten(out: Path, overwrite: bool) -> bool:
    """Say whether a folder to write holds anything; raises ConfigError if that is to stay."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is no folder")
    holds_something = out.exists() and any(out.iterdir())
    if holds_something and not overwrite:
        raise ConfigError(f"out={out} is not empty; give another folder or overwrite=true")
    return holds_something


def require_own_report(file: Path, key: str = "run_name") -> None:
    """Raise ConfigError if writing a command's report would cost something else.

    A report is a JSON file that names its command; runs and exports have folders of their own.
    """
    marker = read_marker(file.parent)
    if marker is not None:
        raise ConfigError(f"{file.parent} is the folder of a {marker['kind']}; give another {key}")
    if not os.path.lexists(file):
        return
    try:
        report = json.loads(file.read_bytes())
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict) or "command" not in report:
        raise ConfigError(f"{file} is there and no report of ours; give another {key}")


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
