"""Two versions of one model's weights, and an engine in a process of its own."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from serving import SETTINGS, local_engine, served

from samebit.recipes.models.tiny_model import write_weights
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.transports.remote import GlooTransport


class Version:
    """A full set of weights under the engine's names."""

    def __init__(self, folder):
        self.folder = folder
        self.specs = load_model_config(folder).param_specs()
        self.params = {spec.name: torch.empty(spec.shape) for spec in self.specs}
        load_safetensors(folder, self.specs, self.params)
        self.digest = weights_digest(self.specs, self.params)

    def without(self, name):
        return {n: p for n, p in self.params.items() if n != name}

    def changed(self, name, value):
        changed = self.params[name].clone()
        changed.view(-1)[0] = value
        return {**self.params, name: changed}


@pytest.fixture(scope="module")
def old(qwen3_path):
    """The weights that engines start with."""
    return Version(qwen3_path)


@pytest.fixture(scope="module")
def new(qwen3_path, tmp_path_factory):
    """Other weights of the same model."""
    folder = tmp_path_factory.mktemp("models") / "new"
    folder.mkdir()
    (folder / "config.json").write_bytes((qwen3_path / "config.json").read_bytes())
    write_weights(folder, seed=11, std=0.2)
    return Version(folder)


@pytest.fixture
def engine(old):
    """One of this process."""
    return local_engine(old.folder)


@pytest.fixture(scope="module")
def expected(old, new):
    """What is served of both versions after a direct update in one process."""
    engine, found = local_engine(old.folder), {}
    for version in (new, old):
        engine.copy_weights(version.params, step=1, digest=version.digest)
        found[version.digest] = served(engine)
    return found


@contextmanager
def remote_engine(folder, num_ranks):
    engine = RemoteEngine(folder, num_ranks=num_ranks, **SETTINGS)
    yield engine
    engine.close()
    codes = [process.exitcode for process in engine._ranks.processes]
    assert codes == [0] * num_ranks, "close leaves a process behind"


@pytest.fixture(scope="module")
def remote(qwen3_path):
    """One engine's process for a module; tests leave it with whole weights."""
    with remote_engine(qwen3_path, 1) as engine:
        yield engine


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "pair"])
def remote_of_any_size(request, qwen3_path):
    """As `remote`; also of two tensor parallel ranks."""
    with remote_engine(qwen3_path, request.param) as engine:
        yield engine


@pytest.fixture
def gloo(remote, old):
    """A weight group of this process and `remote`."""
    source = SimpleNamespace(step=0, params=old.params, specs=old.specs)
    transport = GlooTransport(source, remote, timeout_s=60)
    yield transport
    transport.close()


@pytest.fixture
def pool():
    """Threads for the other ends of groups."""
    with ThreadPoolExecutor(4) as pool:
        yield pool
