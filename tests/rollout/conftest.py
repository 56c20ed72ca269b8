"""Engines for the tests of the rollout."""

import pytest
from late_runner import VOCAB, LateRunner

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine


@pytest.fixture(scope="session")
def make_engine(qwen3_path):
    """Fresh engines on the random Qwen3."""
    return lambda **settings: Engine(qwen3_path, **settings)


@pytest.fixture(scope="session")
def engine(make_engine):
    """One engine for the tests that leave it as it was."""
    return make_engine()


@pytest.fixture(scope="session")
def late_folder(tmp_path_factory):
    """A model of one layer whose samples often end by themselves (token 0)."""
    path = tmp_path_factory.mktemp("late") / "model"
    make_random_model(path, "qwen3", seed=4, tied=True, vocab_size=VOCAB, num_layers=1)
    return path


@pytest.fixture(scope="session")
def plain(late_folder):
    """Nothing in flight, room for everything."""
    return Engine(late_folder, overlap=False, prefix_cache=False)


@pytest.fixture
def make_late(late_folder, monkeypatch):
    """make_late(depth, **settings): an engine with late results and `depth` steps in flight."""
    monkeypatch.setattr("samebit.rollout.engine.Runner", LateRunner)

    def make(depth, **settings):
        engine = Engine(late_folder, overlap=True, **settings)
        assert engine.step_loop.depth == 1
        engine.step_loop.depth = depth
        return engine

    return make


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A model of two layers whose samples seldom end by themselves."""
    path = tmp_path_factory.mktemp("models") / "small"
    make_random_model(path, "qwen3", seed=3, tied=False, vocab_size=29, num_layers=2)
    return path
