"""An engine on a GPU gives memory back and takes it again: graphs and outputs stay to the bit."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.kernels.memory import ResumeError
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

pytestmark = pytest.mark.gpu

GIB = 1 << 30
PROMPTS = make_prompts(40, 5)
PARAMS = SamplingParams(n=3, max_new_tokens=24, ignore_eos=True)
RESTRICTED = SamplingParams(max_new_tokens=8, top_k=5, ignore_eos=True)
TAGS = ["weights", "kv_cache", "cuda_graphs"]


def served(engine):
    groups = [outcomes(engine.generate(PROMPTS, params)) for params in (PARAMS, RESTRICTED)]
    return groups, engine.score(PROMPTS)


def make(path, **settings):
    return Engine(path, device="cuda", page_size=16, max_num_seqs=8, **settings)


@pytest.fixture
def truth(qwen3_path):
    return served(make(qwen3_path, releasable=False, kv_cache_tokens=4096))


def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_graphs_replay_after_each_tag(qwen3_path, truth):
    engine = make(qwen3_path, weights_backup=True, kv_cache_tokens=4096)
    assert served(engine) == truth
    graphs = engine.runner.graphs
    captured, addresses = graphs.num_graphs, [p.data_ptr() for p in engine.weights.values()]
    assert captured > 0
    for tags in (*([tag] for tag in TAGS), TAGS, None):
        done = engine.release_memory_occupation(tags)
        assert all(done[tag] > 0 for tag in tags or TAGS)
        with pytest.raises(WeightSyncError, match="is released"):
            engine.generate(PROMPTS, PARAMS)
        assert engine.resume_memory_occupation(tags) == done
        assert served(engine) == truth
        assert engine.runner.graphs is graphs
        assert graphs.num_graphs == captured
        assert [p.data_ptr() for p in engine.weights.values()] == addresses


def test_twenty_cycles_with_updates_leave_no_trace(qwen3_path, truth):
    engine = make(qwen3_path, kv_cache_tokens=4096)
    weights = {name: p.clone() for name, p in engine.weights.items()}
    kept = []
    for step in range(20):
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        with pytest.raises(WeightSyncError, match="full update"):
            engine.generate(PROMPTS, PARAMS)
        engine.copy_weights(weights, step=step + 1)
        assert served(engine) == truth
        torch.cuda.empty_cache()
        kept.append((torch.cuda.memory_reserved(), free_bytes()))
    assert len(set(kept[2:])) == 1, kept  # the first two still let go of what loading took
    assert kept[-1][0] <= kept[0][0]


def test_a_released_engine_leaves_the_device_to_others(qwen3_path, truth):
    gc.collect()
    torch.cuda.empty_cache()
    before = free_bytes()
    engine = make(qwen3_path, weights_backup=True, kv_cache_tokens=1 << 23)
    assert served(engine) == truth
    assert before - free_bytes() > 3 * GIB
    engine.release_memory_occupation()
    assert before - free_bytes() < GIB // 2
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_a_resume_without_room_is_told_and_repeated(qwen3_path, truth):
    engine = make(qwen3_path, weights_backup=True, kv_cache_tokens=1 << 23)
    assert served(engine) == truth
    engine.release_memory_occupation()
    hog = torch.empty(free_bytes() - GIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(ResumeError, match="of tag kv_cache wanted"):
        engine.resume_memory_occupation()
    with pytest.raises(WeightSyncError, match="memory of kv_cache, cuda_graphs is released"):
        engine.generate(PROMPTS, PARAMS)
    del hog
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_any_thread_may_release_and_resume(qwen3_path, truth):
    engine = make(qwen3_path, weights_backup=True, kv_cache_tokens=4096)
    assert served(engine) == truth
    for call in (engine.release_memory_occupation, engine.resume_memory_occupation):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(call).result()["weights"] > 0
    assert served(engine) == truth


def test_pages_of_paused_requests_are_kept(qwen3_path):
    settings = {"kv_cache_tokens": 4096, "weights_backup": True}
    plain, engine = make(qwen3_path, **settings), make(qwen3_path, **settings)
    found = []
    for own in (plain, engine):
        for prompt in PROMPTS:
            own.add_request(prompt, PARAMS, [1, 2, 3])
        done = [*own.step(), *own.step(), *own.step()]
        if own is engine:
            own.pause_generation("keep")
            own.release_memory_occupation()
            own.resume_memory_occupation()
            own.continue_generation()
        while own.has_unfinished_requests:
            done += own.step()
        found.append(outcomes(done))
    assert found[0] == found[1]


def test_memory_that_the_trainer_owns_stays(qwen3_path, truth):
    engine = make(qwen3_path, kv_cache_tokens=4096)
    memory = {name: p.clone() for name, p in engine.weights.items()}
    engine.bind_weights(memory, step=1)
    assert served(engine) == truth
    assert engine.release_memory_occupation()["weights"] == 0
    engine.resume_memory_occupation()
    assert served(engine) == truth
