"""A pytest plugin: which lines each test executes, those of its fixtures and children included.

    pytest -n 2 -p mutants.reach --reach-folder FOLDER

Every process writes FOLDER/NAME.json: "tests" as {id: {"seconds": s, "passed": bool, "fixtures":
[name], "lines": {file: [n]}}} and "fixtures", those of several tests, as {name: seconds}. What such
a fixture executes counts for each of its tests, its seconds for none. A child that outlives its
test counts for the test that started it.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import lines

Lines = set[tuple[str, int]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reach-folder", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getvalue("numprocesses", 0):
        config.pluginmanager.register(Recorder(config), "reach-recorder")


class Recorder:
    """Watches this process and reads what its children wrote."""

    def __init__(self, config: pytest.Config) -> None:
        name = getattr(config, "workerinput", {}).get("workerid", "main")
        folder = config.getvalue("--reach-folder").absolute()
        self._target = folder / f"{name}.json"
        self._children = folder / f"{name}-children"
        self._children.mkdir(parents=True)
        os.environ[lines.VARIABLE] = str(self._children)
        hook = str(Path(__file__).parent / "hook")
        os.environ["PYTHONPATH"] = os.pathsep.join([hook, os.environ.get("PYTHONPATH", "")])
        self._read: dict[Path, int] = {}
        self._now: Lines = set()
        self._of_fixture: dict[str, Lines] = defaultdict(set)
        self._seconds_of_fixture: dict[str, float] = defaultdict(float)
        self._seconds_inside = 0.0  # of the fixtures that the running test was the first to ask for
        self._of_test: dict[str, dict] = {}
        self._failed: set[str] = set()
        lines.watch(lambda name, line: self._now.add((name, line)))

    def _take(self) -> Lines:
        """What was executed since the last time, here and in children."""
        for path in self._children.iterdir():
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                for text in iter(file.readline, ""):
                    if text.endswith("\n"):
                        name, _, line = text.rpartition(":")
                        self._now.add((name, int(line)))
                        self._read[path] = file.tell()
        taken, self._now = self._now, set()
        lines.watch_again()
        return taken

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        outside, start = self._take(), time.monotonic()
        try:
            return (yield)
        finally:
            self._of_fixture[fixturedef.argname] |= self._take()
            self._seconds_of_fixture[fixturedef.argname] = time.monotonic() - start
            self._seconds_inside += time.monotonic() - start
            self._now |= outside

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._take()
        start = time.monotonic()
        try:
            return (yield)
        finally:
            seconds, reached = time.monotonic() - start, self._take()
            shared = [name for name in item.fixturenames if name in self._seconds_of_fixture]
            for name in shared:
                reached |= self._of_fixture[name]
            by_file = defaultdict(list)
            for file, line in sorted(reached):
                by_file[file].append(line)
            self._of_test[item.nodeid] = {
                "seconds": round(seconds - self._seconds_inside, 3),
                "fixtures": shared,
                "lines": by_file,
            }
            self._seconds_inside = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        for name, test in self._of_test.items():
            test["passed"] = name not in self._failed
        found = {"tests": self._of_test, "fixtures": self._seconds_of_fixture}
        self._target.write_text(json.dumps(found))
