"""What a benchmark leaves: an aligned table on the screen, and what bench.json says of a model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

REPORT_FILE = "bench.json"


class BenchError(RuntimeError):
    """A benchmark did not measure what it says."""


def format_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Align columns, the first num_left to the left, the others to the right; header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def model_fields(folder: str) -> dict[str, str]:
    """Return what a report says of its model: the folder's name, a digest of its config.json."""
    config = Path(folder) / "config.json"
    return {
        "model": Path(folder).resolve().name,
        "model_config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
