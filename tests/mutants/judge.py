"""Judges mutants: a copy of the repository for each of a few at a time, tests until one fails.

The libraries are imported once; every round of tests is a fork of this process, in which the code
itself is imported anew. A test that hangs kills its mutant like one that fails.
"""

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest
import torch

HUNG_S, HUNG_FACTOR = 180.0, 10.0
"""A test hangs that takes longer than HUNG_S + HUNG_FACTOR times what it took without the lie: long
enough that tests with deadlines of their own, up to 170 s, fail by these. It stands for the
`timeout` of pyproject.toml, which makes a hang a failure of `make test` too."""


class Mutant(Protocol):
    """What is judged."""

    file: str

    @property
    def name(self) -> str: ...
    def text(self, root: Path) -> str: ...


@dataclass(frozen=True)
class NoMutant:
    """A control: the file as it is. Tests that fail with it say nothing."""

    name: str
    file: str

    def text(self, root: Path) -> str:
        """The file's text."""
        return (root / self.file).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Round:
    """Tests to run in one process: (id, seconds that it took without the lie).

    An id without [parameters] stands for all that its function has; the seconds are those of one.
    """

    tests: tuple[tuple[str, float], ...]


@dataclass
class Verdict:
    """What became of a mutant."""

    name: str
    killed_by: str = ""
    hung: bool = False  # the test that killed it
    num_tests: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether any test noticed it."""
        return bool(self.killed_by)

    @property
    def end(self) -> str:
        """How it ended, in words."""
        return f"killed by {self.killed_by}{' (hung)' * self.hung}" if self.killed else "SURVIVED"


@dataclass
class _Place:
    """A copy of the repository, and what runs in it."""

    folder: Path
    mutant: Mutant | None = None
    original: str = ""
    rounds: Iterator[Round] = field(default_factory=lambda: iter(()))
    current: Round | None = None
    verdict: Verdict | None = None
    pid: int = 0
    started: float = 0.0


IMPORT = "its import"
"""In place of a test, where one could not be loaded."""
_BROKEN = 70
"""Exit code of a round that could not even begin."""

_times = itertools.count(int(time.time()) + 1000)


def repository_files(root: Path) -> list[str]:
    """Names of the files that git knows or would take; one that is removed may be among them."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted(filter(None, names.split("\0")))


def copy_repository(root: Path, folder: Path) -> Path:
    """A clone with the files of the working tree: tests ask git about their repository."""
    clone = ["git", "clone", "-q", "--shared", "--no-checkout", str(root), str(folder)]
    subprocess.run(clone, check=True)
    for name in repository_files(root):
        if (root / name).is_file() or (root / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)
    subprocess.run(["git", "reset", "-q"], cwd=folder, check=True)
    return folder


def _put(file: Path, text: str) -> None:
    """Write a source file so that no compiled form of another text is taken for its own."""
    file.write_text(text, encoding="utf-8")
    os.utime(file, (moment := next(_times), moment))


class Judge:
    """Runs up to `num_workers` mutants at a time in copies under `scratch`."""

    def __init__(self, root: Path, scratch: Path, num_workers: int) -> None:
        self._root = root
        scratch.mkdir(exist_ok=True)
        self._places = [
            _Place(copy_repository(root, scratch / f"copy{i}")) for i in range(num_workers)
        ]
        torch.set_num_threads(1)

    def judge(
        self,
        mutants: Iterable[tuple[Mutant, Iterable[Round]]],
        report: Callable[[Verdict], None],
    ) -> None:
        """Give each mutant its rounds, one after another, until a test fails."""
        waiting = deque(mutants)
        while waiting or any(place.mutant for place in self._places):
            for place in self._places:
                if place.mutant is None and waiting:
                    mutant, rounds = waiting.popleft()
                    place.original = (place.folder / mutant.file).read_text(encoding="utf-8")
                    _put(place.folder / mutant.file, mutant.text(place.folder))
                    place.mutant, place.rounds = mutant, iter(rounds)
                    place.verdict, place.started = Verdict(mutant.name), time.time()
                    self._next_round(place, report)
                elif place.mutant is not None and self._is_over(place):
                    self._next_round(place, report)
            time.sleep(0.02)

    def _next_round(self, place: _Place, report: Callable[[Verdict], None]) -> None:
        assert place.mutant is not None
        assert place.verdict is not None
        place.current = None if place.verdict.killed else next(place.rounds, None)
        if place.current is not None:
            place.pid = self._fork(place, place.current)
            return
        place.verdict.seconds = round(time.time() - place.started, 1)
        _put(place.folder / place.mutant.file, place.original)
        place.mutant = None
        report(place.verdict)

    def _fork(self, place: _Place, current: Round) -> int:
        progress = self._progress(place)
        progress.write_text("")
        if pid := os.fork():
            return pid
        os.setsid()
        log = os.open(place.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place.folder)
        paths = [str(place.folder / ".typing"), str(place.folder / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        own = [str(self._root / ".typing"), str(self._root / "tests")]
        sys.path[:] = paths + [p for p in sys.path if p not in own]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=0"]
        options += ["-m", "not gpu"]
        code = _BROKEN
        try:
            _require_code_of(place.folder)
            tests = [name for name, _ in current.tests]
            code = pytest.main([*options, *tests], plugins=[_Progress(progress)])
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _progress(self, place: _Place) -> Path:
        return place.folder.with_suffix(".progress")

    def _is_over(self, place: _Place) -> bool:
        """Whether the round has ended, or was ended; its result is in the verdict then."""
        assert place.verdict is not None
        assert place.current is not None
        pid, status = os.waitpid(place.pid, os.WNOHANG)
        progress = self._progress(place)
        begun = progress.read_text().splitlines()
        if not pid:
            if time.time() - progress.stat().st_mtime < self._patience(place.current, begun):
                return False
            os.killpg(place.pid, signal.SIGKILL)
            os.waitpid(place.pid, 0)
        else:
            _kill_group(place.pid)
        place.verdict.num_tests += len(begun)
        code = os.waitstatus_to_exitcode(status)
        if code == _BROKEN:
            raise RuntimeError(place.folder.with_suffix(".log").read_text(errors="replace"))
        if pid and code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._require_import_error(place)
        if not pid or code != 0:
            place.verdict.killed_by = begun[-1] if begun else IMPORT
            place.verdict.hung = not pid
        return True

    @staticmethod
    def _require_import_error(place: _Place) -> None:
        """A test that is not found kills nothing, unless the lie keeps its file from loading."""
        log = place.folder.with_suffix(".log").read_text(errors="replace")
        if "= ERRORS =" not in log and "Error while loading conftest" not in log:
            raise ValueError(f"mutant {place.verdict and place.verdict.name}: no such tests\n{log}")

    @staticmethod
    def _patience(current: Round, begun: list[str]) -> float:
        """Seconds that the test which has begun last may take."""
        if not begun:
            return HUNG_S
        usual, test = dict(current.tests), begun[-1]
        return HUNG_S + HUNG_FACTOR * usual.get(test, usual.get(test.partition("[")[0], 0.0))


def _require_code_of(folder: Path) -> None:
    """Fail unless `samebit` is this copy's code and not the installed one."""
    found, *_ = importlib.util.find_spec("samebit.kernels").submodule_search_locations
    if Path(found).resolve() != folder.resolve() / "kernels":
        raise ImportError(f"samebit.kernels is {found}, not that of {folder}")


def _kill_group(pid: int) -> None:
    """Children that the tests left."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class _Progress:
    """Notes which tests have begun; a pytest plugin."""

    def __init__(self, target: Path) -> None:
        self._target = target

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self._target.open("a") as file:
            file.write(f"{nodeid}\n")
