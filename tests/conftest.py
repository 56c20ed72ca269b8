"""One thread, no caches outside the session, and the small random models of the tests."""

import copy
import functools
import gc
import importlib
import multiprocessing
import os
import shutil
import threading
from multiprocessing import popen_forkserver
from multiprocessing.connection import wait
from pathlib import Path

# Tests have both ends of a weight group in one process. Two gloo groups that begin at one moment
# then write torch's flight recorder together, which its lock does not cover (torch 2.11): a crash.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")

import pytest
import torch
from conservation import Watch

from samebit.recipes.cli import compose
from samebit.recipes.models.tiny_model import make_random_model
from samebit.recipes.run import report
from samebit.rollout import remote_ranks
from samebit.rollout.engine import Engine
from samebit.trainer.megatron.imports import lean_imports

torch.set_num_threads(1)
# To look for cycles again and again through all that imports have made takes 4% of the time.
gc.set_threshold(50_000, 20, 100)

with lean_imports():
    importlib.import_module("samebit.trainer.megatron.trainer")


def pytest_collection_modifyitems(items):
    """What is marked gpu or multigpu is skipped where there is no such device, and nothing else."""
    found = torch.cuda.device_count()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        needed = 2 if "multigpu" in marks else 1 if "gpu" in marks else 0
        if found < needed:
            reason = f"needs CUDA devices: {needed}, has {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """The self-check's cache starts empty and never leaks into the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _composed_once():
    """What Hydra makes of our own files and of the same choices, which takes it 0.1 s, is copied
    from the second time on."""
    original, folder, made = compose._by_hydra, compose.CONFIG_DIR, {}

    @functools.wraps(original)
    def by_hydra(command, schema, choices):
        key = command, schema or None, tuple(choices)
        if folder != compose.CONFIG_DIR:
            return original(command, schema, choices)
        if key not in made:
            made[key] = original(command, schema, choices)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_by_hydra", by_hydra)
        yield


@pytest.fixture(scope="session", autouse=True)
def _drawn_once():
    """Charts of equal curves, which most runs are to have, are drawn once: one takes 0.1 s."""
    original, made = report._line_svg, {}

    @functools.wraps(original)
    def line_svg(lines, prefix):
        key = repr(lines), prefix
        if key not in made:
            made[key] = original(lines, prefix)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_line_svg", line_svg)
        yield


@pytest.fixture(scope="session", autouse=True)
def _watch():
    """Sees every engine of this process."""
    watch, original = Watch(), Engine.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        watch.made(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", init)
        patch.setattr(Engine, "__del__", lambda self: watch.going(self), raising=False)
        yield watch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that fails or is broken off may leave requests: it has its own error to tell."""
    try:
        return (yield)
    except BaseException:
        if watch := getattr(item, "funcargs", {}).get("_watch"):
            watch.leaves_requests = True
        raise


@pytest.fixture(autouse=True)
def _conservation(_watch, request):
    """No engine that a test made or used has lost a page, a slot or a sample, or is still busy."""
    _watch.leaves_requests = request.node.get_closest_marker("leaves_requests") is not None
    yield
    _watch.after_test()


_poll, _one_poll = popen_forkserver.Popen.poll, threading.Lock()


def _poll_in_turn(process, flag=os.WNOHANG):
    """As it is, where several threads ask: the exit code can be read once, and who reads nothing
    takes it for 255 (Python 3.12)."""
    if process.returncode is None and wait([process.sentinel], 0 if flag else None):
        with _one_poll:
            return _poll(process)
    return process.returncode


@pytest.fixture(scope="session")
def forkserver(_private_cache):
    """A multiprocessing context whose processes have all imported that most of them would.

    Where GPUs are seen, each imports for itself: no process uses a GPU of which its parent knows.
    """
    if torch.cuda.device_count():
        yield multiprocessing.get_context("spawn")
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the server is not told our sys.path
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setattr(popen_forkserver.Popen, "poll", _poll_in_turn)
        yield context


@pytest.fixture(scope="session", autouse=True)
def _forked_engines(forkserver):
    """This process starts engines so: to import torch takes longer than most tests. Runs in
    processes of their own start them as users' runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_ranks, "CONTEXT", forkserver)
        yield


@pytest.fixture(scope="session")
def qwen3_path(tmp_path_factory):
    """A random Qwen3 with an output layer of its own. Do not write to it."""
    path = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_model(path, "qwen3", seed=1, tied=False)
    return path


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory):
    """A random Llama with tied embeddings. Do not write to it."""
    path = tmp_path_factory.mktemp("models") / "llama"
    make_random_model(path, "llama", seed=2, tied=True)
    return path


@pytest.fixture(scope="session")
def qwen2_path(tmp_path_factory):
    """A random Qwen2 with tied embeddings and yarn, whose first context is shorter than the tests'
    samples. Do not write to it."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    make_random_model(path, "qwen2", seed=6, tied=True, rope_scaling=yarn)
    return path


@pytest.fixture
def model_copy(qwen3_path, tmp_path):
    """A copy of the random Qwen3 that a test may damage."""
    return shutil.copytree(qwen3_path, tmp_path / "model")
