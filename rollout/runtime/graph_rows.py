"""How many rows a CUDA graph of a decode step has: what is asked of it, rounded up.

Few graphs are to serve all steps. What is rounded up is computed as the rest is, so this is also
what a step costs that guesses tokens: one sample's guesses pad the whole batch.
"""

import bisect

BUCKETS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512,
    640, 768, 896, 1024,
)  # fmt: skip


def bucket_of(num_samples: int) -> int:
    """The bucket for so many samples, up to the largest one."""
    return BUCKETS[bisect.bisect_left(BUCKETS, num_samples)]


def queries_of(most_guesses: int) -> int:
    """Rows of each sample, where the one with the most guesses has so many."""
    return 1 << most_guesses.bit_length()


def graph_rows(num_samples: int, most_guesses: int) -> int | None:
    """All rows of the graph for such a step; None: none is so large."""
    if num_samples > BUCKETS[-1]:
        return None
    rows = bucket_of(num_samples) * queries_of(most_guesses)
    return rows if rows <= BUCKETS[-1] else None
