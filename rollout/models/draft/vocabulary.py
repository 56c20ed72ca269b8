"""The draft vocabulary: which of the target's tokens a draft can say.

Checkpoints hold it twice: `d2t` [Vd] int64 is each draft token's target id less its draft id, `t2d`
[V] bool says which target ids are there. Draft ids are in the order of the target's.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Target ids [Vd] int64 by draft id, ascending, of a target's vocabulary of `vocab_size`."""

    token_ids: Tensor
    vocab_size: int

    @classmethod
    def whole(cls, vocab_size: int) -> Self:
        """Every token of the target."""
        return cls(torch.arange(vocab_size), vocab_size)

    @classmethod
    def most_frequent(cls, counts: np.ndarray, size: int) -> Self:
        """The `size` most frequent tokens by counts [V]; ties go to the lower id, so that unused
        tokens fill up in order. ValueError for more than there are."""
        if not 1 <= size <= len(counts):
            raise ValueError(f"draft_vocab_size is {size}; it must be in [1, {len(counts)}]")
        order = np.lexsort((np.arange(len(counts)), -np.asarray(counts, np.int64)))
        return cls(torch.from_numpy(np.sort(order[:size]).astype(np.int64)), len(counts))

    @classmethod
    def from_tensors(cls, d2t: Tensor, t2d: Tensor) -> Self:
        """Of a checkpoint's tensors; ValueError unless both say the same."""
        token_ids = d2t + torch.arange(len(d2t))
        members = t2d.nonzero().flatten()
        if not torch.equal(token_ids, members):
            where = "they have another number of tokens"
            if len(members) == len(token_ids):
                first = int((token_ids != members).nonzero()[0])
                where = f"draft token {first} is {token_ids[first]} by d2t, {members[first]} by t2d"
            raise ValueError(f"d2t and t2d disagree: {where}")
        return cls(token_ids, len(t2d))

    @property
    def d2t(self) -> Tensor:
        """[Vd] int64, what is added to a draft id."""
        return self.token_ids - torch.arange(len(self.token_ids))

    @property
    def t2d(self) -> Tensor:
        """[V] bool."""
        members = torch.zeros(self.vocab_size, dtype=torch.bool)
        members[self.token_ids] = True
        return members

    def __len__(self) -> int:
        return len(self.token_ids)
