"""torch's deterministic implementations are on in a block, and as they were behind it."""

import pytest
import torch
import torch.utils.deterministic as settings

from samebit.kernels.deterministic import deterministic


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("before", [(False, False, True), (True, True, True), (True, False, False)])
def test_the_users_setting_comes_back(before):
    first = state()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
        within = []
        with pytest.raises(KeyError), deterministic():
            {}[within.append(state())]
        assert within == [(True, False, False)]
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(first[0], warn_only=first[1])
        settings.fill_uninitialized_memory = first[2]
