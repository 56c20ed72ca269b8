"""What a page shows of runs: every metric by step and samples, thinned so that it opens at once.

No number is made here: what is shown is a number of metrics.jsonl or samples.jsonl, or left out.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from samebit.recipes.run.kept_samples import MOST_SAMPLE_BYTES, KeptSamples, Row
from samebit.recipes.run.metrics import METRICS_FILE, SAMPLES_FILE, read_object, read_row

SUMMARY_FILE = "summary.json"
MOST_POINTS = 1000
"""Of a curve: of each of its stretches the first, the lowest and the highest are kept."""
_LAST = 200
"""Bytes before the end of what was read, by which it is known again."""


class FollowedLines:
    """The lines of a .jsonl file that grows; one that was cut back, by a resume, is read anew."""

    def __init__(
        self, path: Path, take: Callable[[list[bytes]], object], reset: Callable[[], object]
    ) -> None:
        """take: called with what has come, and again with all of it where it has raised; reset:
        before all comes again from the first on."""
        self._path, self._take, self._reset = path, take, reset
        self._file: BinaryIO | None = None  # open, so that no other file gets its inode
        self._offset, self._last = 0, b""

    def read(self) -> bool:
        """Take what has come; returns whether there was anything. A torn last line waits. Raises
        FileNotFoundError for a file that was there and is gone."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            if self._file is None:
                return False
            raise FileNotFoundError(f"{self._path} is gone") from None
        before, self._file = self._file, file
        if again := before is None or not self._goes_on(before, file):
            self._offset, self._last = 0, b""
            self._reset()
        if before is not None:
            before.close()
        file.seek(self._offset)
        whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return again
        self._take(whole.split(b"\n"))
        self._offset += len(whole) + 1
        self._last = whole[-_LAST:]
        return True

    def _goes_on(self, before: BinaryIO, file: BinaryIO) -> bool:
        """Whether it is the file that it was, with what was taken of it."""
        file.seek(max(0, self._offset - 1 - len(self._last)))
        ends = (self._last + b"\n") if self._offset else b""
        same = os.path.samestat(os.fstat(before.fileno()), os.fstat(file.fileno()))
        return same and file.read(len(ends)) == ends

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


class RunData:
    """A run's metrics and samples as far as they are written.

    Raises FileNotFoundError for a folder without, and, wherever it reads, ValueError for a damaged
    line, which it names, as long as it is there.
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
        self.samples = KeptSamples(folder / SAMPLES_FILE)
        self._had_summary = False
        self._files = (
            FollowedLines(folder / METRICS_FILE, self._take, self._forget),
            FollowedLines(folder / SAMPLES_FILE, self.samples.take, self.samples.clear),
        )
        self.refresh()

    def refresh(self) -> bool:
        """Read what was written since; returns whether there was anything."""
        return sum(file.read() for file in self._files) > 0

    def has_new_summary(self) -> bool:
        """Return whether the run has ended, or begun again, since `shown` was asked."""
        return (self.folder / SUMMARY_FILE).exists() is not self._had_summary

    def shown(self, sample_bytes: int = MOST_SAMPLE_BYTES) -> Row:
        """Return what a page shows of it, as JSON values; of its samples those of so many bytes,
        see KeptSamples.chosen; none with 0."""
        chosen = self.samples.chosen(sample_bytes) if sample_bytes else []
        return {
            "name": self.name,
            "summary": self._summary(),
            "series": {key: thinned(line) for key, line in sorted(self._series.items())},
            "last": {key: line[-1] for key, line in self._series.items()},
            "samples": [self.samples.shown(number) for number in chosen],
            "num_samples": len(self.samples),
        }

    def _summary(self) -> Row:
        """What the run has come to; nothing while it goes on."""
        file = self.folder / SUMMARY_FILE
        self._had_summary = False
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return {}
        found = read_object(content, str(file))
        try:
            json.dumps(found, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        self._had_summary = True
        return found

    def _forget(self) -> None:
        self._num_rows = 0
        self._series.clear()

    def _take(self, lines: list[bytes]) -> None:
        first = self._num_rows + 1
        name = f"{self.folder / METRICS_FILE}, line"
        rows = [_numbers(line, f"{name} {first + i}") for i, line in enumerate(lines)]
        self._num_rows += len(rows)
        for row in rows:
            step = row.pop("step")
            for key, value in row.items():
                self._series.setdefault(key, []).append((step, value))


def _numbers(line: bytes, name: str) -> Row:
    """What is a number in a row of metrics, and its step."""
    row = {k: v for k, v in read_row(line, name).items() if isinstance(v, int | float)}
    if wrong := [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]:
        raise ValueError(f"{name} is damaged: its {wrong[0]!r} is no finite number")
    return row


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
