"""Engines for the tests of the rollout."""

import pytest

from samebit.rollout.engine import Engine


@pytest.fixture(scope="session")
def make_engine(qwen3_path):
    """Fresh engines on the random Qwen3."""
    return lambda **settings: Engine(qwen3_path, **settings)


@pytest.fixture(scope="session")
def engine(make_engine):
    """One engine for the tests that leave it as it was."""
    return make_engine()
