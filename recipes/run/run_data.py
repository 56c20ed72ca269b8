"""What a page shows of runs: every metric by step and samples, thinned so that it opens at once.

No number is made here: what is shown is a number of metrics.jsonl or samples.jsonl, or left out.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samebit.recipes.run.metrics import METRICS_FILE, SAMPLES_FILE

SUMMARY_FILE = "summary.json"
MOST_POINTS = 1000
"""Of a curve: of each of its stretches the first, the lowest and the highest are kept."""
MOST_SAMPLES = 2000
"""Of a run, evenly over all that it has kept."""
MOST_SAMPLE_BYTES = 4 << 20
"""Of a page: fewer samples are shown where they are long."""

Row = dict[str, Any]


class FollowedLines:
    """The lines of a .jsonl file that grows; one that was cut back, by a resume, is read anew."""

    def __init__(
        self, path: Path, take: Callable[[list[bytes]], object], reset: Callable[[], object]
    ) -> None:
        """take: called with what has come; reset: before all comes again from the first on."""
        self._path, self._take, self._reset = path, take, reset
        self._file: tuple[int, int] = (0, 0)
        self._offset = 0

    def read(self) -> bool:
        """Take what has come; returns whether there was anything. A torn last line waits."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            found = os.fstat(file.fileno())
            again = (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset
            if again:
                self._file, self._offset = (found.st_dev, found.st_ino), 0
                self._reset()
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return again
        self._offset += len(whole) + 1
        self._take(whole.split(b"\n"))
        return True


class RunData:
    """A run's metrics and samples as far as they are written.

    Raises FileNotFoundError for a folder without, and, wherever it reads, ValueError for a damaged
    line, which it names. Samples that are not shown are not looked at.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if not (folder / METRICS_FILE).is_file():
            inner = sorted(
                str(f.parent.relative_to(folder)) for f in folder.glob("**/metrics.jsonl")
            )
            hint = f"; the runs in it: {', '.join(inner[:8])}" if inner else ""
            raise FileNotFoundError(f"{folder} holds no {METRICS_FILE} of a run{hint}")
        self.folder, self.name = folder, name
        self._series: dict[str, list[tuple[int, float]]] = {}
        self._num_rows = 0
        self._samples: list[bytes] = []
        self._had_summary = False
        self._files = (
            FollowedLines(folder / METRICS_FILE, self._take, self._forget),
            FollowedLines(folder / SAMPLES_FILE, self._samples.extend, self._samples.clear),
        )
        self.refresh()

    def refresh(self) -> bool:
        """Read what was written since; returns whether there was anything."""
        return sum(file.read() for file in self._files) > 0

    def has_new_summary(self) -> bool:
        """Return whether the run has ended, or begun again, since `shown` was asked."""
        return (self.folder / SUMMARY_FILE).exists() is not self._had_summary

    def shown(self, sample_bytes: int = MOST_SAMPLE_BYTES) -> Row:
        """Return what a page shows of it, as JSON values; at least two samples, if there are."""
        return {
            "name": self.name,
            "summary": self._summary(),
            "series": {key: thinned(line) for key, line in sorted(self._series.items())},
            "last": {key: line[-1] for key, line in self._series.items()},
            "samples": [
                _row(self.folder / SAMPLES_FILE, number, self._samples[number])
                for number in self._shown_samples(sample_bytes)
            ],
            "num_samples": len(self._samples),
        }

    def _shown_samples(self, most_bytes: int) -> list[int]:
        """The places of as many samples as are shown, evenly over all."""
        places, most = range(len(self._samples)), MOST_SAMPLES
        while True:
            found = evenly(places, most)
            size = sum(len(self._samples[place]) for place in found)
            if size <= most_bytes or len(found) <= 2:
                return found
            most = max(2, min(len(found) - 1, len(found) * most_bytes // size))

    def _summary(self) -> Row:
        """What the run has come to; nothing while it goes on."""
        file = self.folder / SUMMARY_FILE
        try:
            self._had_summary = False
            found = json.loads(file.read_bytes())
            self._had_summary = True
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        return found if isinstance(found, dict) else {}

    def _forget(self) -> None:
        self._num_rows = 0
        self._series.clear()

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            row = _row(self.folder / METRICS_FILE, self._num_rows, line)
            self._num_rows += 1
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._series.setdefault(key, []).append((row["step"], value))


def _row(path: Path, number: int, line: bytes) -> Row:
    """A line of a file, whose lines count from 0, as its row."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
        raise ValueError("no JSON object with a whole number `step`")
    except ValueError as error:
        raise ValueError(f"{path}, line {number + 1} is damaged: {error}") from error


def thinned(line: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most `most` of a curve's points, in order; all of them if there are no more.

    The first and the last are kept, and of every stretch between its lowest and its highest.
    """
    if len(line) <= most:
        return list(line)
    inner, stretches = range(1, len(line) - 1), (most - 2) // 2
    kept = {0, len(line) - 1}
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept |= {min(part, key=lambda p: line[p][1]), max(part, key=lambda p: line[p][1])}
    return [line[place] for place in sorted(kept)]


def evenly[T](items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, in order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]
