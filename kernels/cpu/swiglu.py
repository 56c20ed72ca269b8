"""swiglu on the CPU, composed of exp and exact operations.

torch's own silu and sigmoid use another exp for the last elements of an array than for the rest, so
an element's bits would depend on its place (measured: unequal at every odd offset tried).
"""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] = [gate; up] fp32 -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
