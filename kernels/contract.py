"""The numbers and orders that bits depend on. It is the leaf that all of kernels/ imports.

A change of anything here changes bits and raises CONTRACT_VERSION. docs/contract.md says what the
operations mean.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CONTRACT_VERSION = 2
"""It stands in every numerics profile and is raised whenever an implementation's bits change."""

CPU_ROW_BLOCK = 16
"""The rows of every product on the CPU; others are filled up to a multiple of it, because a BLAS
takes other code paths for fewer."""

CPU_QUERY_TILE = 16
"""The query rows of every product of attention on the CPU."""

CPU_KV_TILE = 64
"""The keys that one step of the online softmax takes on the CPU, where there is one split."""

GPU_KV_TILE = 128
"""The keys that one step of the online softmax takes on a GPU (settled with GPU_KV_SPLIT by one
sweep on an H200: docs/results/h200_attention_constants.json)."""

GPU_KV_SPLIT = 1024
"""The keys after which the online softmax starts anew on a GPU; the splits merge in order."""

GPU_NORM_ROWS = 8
"""The rows of at most 256 elements that one program of rms_norm takes on a GPU: they fix the tree
of a row's sum of squares, for query and key heads too."""

VOCAB_MULTIPLE = 1024
"""The vocabulary counts as padded to a multiple of it, whatever the tensor parallel size."""

LSE_SEGMENTS = 8
"""The equal parts of the padded vocabulary whose log-sum-exps are merged in ascending order, so
that 1, 2, 4 and 8 ranks may hold them."""

GPU_LSE_BLOCK = 1024
"""The elements of a segment that are summed side by side on a GPU, block after block, before the
one tree over the block."""

GPU_LIMITS_BLOCK = 4096
"""The tokens whose masses are summed side by side where top_p's threshold is sought on a GPU."""

TP_SEGMENTS = 8
"""The parts of K that a row-parallel product is cut into under tp_invariant, and the most ranks."""


def padded_vocab_size(vocab_size: int) -> int:
    """vocab_size rounded up to a multiple of VOCAB_MULTIPLE."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tree_sum(parts: "list[Tensor]") -> "Tensor":
    """Sum of a power of two of equally shaped tensors, neighbours first: ((0 + 1) + (2 + 3))."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
