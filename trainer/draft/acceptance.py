"""How many tokens a draft would have been worth, from samples that the target drew by itself.

As long as a draft is right, what it was taught with, the sample's own token, is what it would have
been fed. So its choices in every column, by the noise that drew the sample (DraftTrainer.choices),
tell what a chain of drafts would have got accepted, without drawing anything.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def accept_lengths(
    drafted: np.ndarray, token_ids: np.ndarray, rows: np.ndarray, seq_lens: Sequence[int]
) -> list[int]:
    """Tokens that each verification yields, the target's own one included where the sample has it.

    drafted [passes, T]: a pass's choice in every column (DraftTrainer.choices). token_ids [T] and
    rows [R], ascending, are a micro-batch's: row r's next token was drawn. The first token of a
    stretch of rows needs no draft; from then on each verification begins behind the last token.
    """
    passes = len(drafted)
    sample_of = np.repeat(np.arange(len(seq_lens)), seq_lens)
    drawn = np.zeros(len(token_ids), bool)
    drawn[rows] = True
    lengths = []
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(rows), 1)
                 if b != a + 1 or sample_of[a] != sample_of[b]), len(rows)]  # fmt: skip
    for start, stop in pairwise(cuts):
        row, end = int(rows[start]) + 1, int(rows[stop - 1])
        while row <= end:
            accepted = 0
            while accepted < passes and row + accepted <= end:
                answer = drafted[accepted, row - 1]
                if answer != token_ids[row + accepted + 1]:
                    break
                accepted += 1
            lengths.append(min(accepted + 1, end - row + 1))
            row += lengths[-1]
    return lengths
