"""What the streaming products refuse, before a GPU is asked for anything."""

import pytest
import torch

from samebit.kernels.gpu import skinny


def test_tile_that_does_not_divide_the_weight():
    x, weight, y = (
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((4, 128), (256, 128), (4, 256))
    )
    with pytest.raises(ValueError, match="tile takes 48 x 128 of a weight 256 x 128; it must"):
        skinny.matmul(x, weight, y, skinny.Tile(32, 128, 4, 4, tail=16))
