"""An engine gives memory back and takes it again: what it then serves, and what it refuses."""

import re
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_same_bits, make_prompts, outcomes

from samebit.kernels.memory import HostMemory, ReleasedError, ResumeError
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

PROMPTS = make_prompts(40, 5)
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=24, ignore_eos=True)
TAGS = ["weights", "kv_cache", "cuda_graphs", "draft"]


def served(engine):
    return outcomes(engine.generate(PROMPTS, PARAMS)), engine.score(PROMPTS)


@pytest.fixture(scope="module")
def truth(engine):
    return served(engine)


def sizes(engine):
    return {tag: engine.arena.num_bytes(tag) for tag in TAGS}


def run_to_end(engine):
    done = []
    while engine.has_unfinished_requests:
        done += engine.step()
    return outcomes(done)


def test_everything_is_released_and_comes_back(make_engine, truth):
    engine = make_engine(weights_backup=True)
    addresses = [p.data_ptr() for p in engine.weights.values()]
    weights = {name: p.clone() for name, p in engine.weights.items()}
    version, digest, size = engine.weight_version, engine.digest(), sizes(engine)
    assert engine.memory_occupation() == {t: (size[t], size[t]) for t in ("weights", "kv_cache")}
    assert size["weights"] >= sum(p.nbytes for p in weights.values())
    assert size["kv_cache"] == engine.kv_capacity * 768  # bytes a token
    assert served(engine) == truth
    for _ in range(2):
        assert engine.release_memory_occupation() == size
        assert [x.resident for x in engine.memory_occupation().values()] == [0, 0]
        assert int(torch.stack([p.count_nonzero() for p in engine.weights.values()]).sum()) == 0
        assert engine.resume_memory_occupation() == size
        assert [p.data_ptr() for p in engine.weights.values()] == addresses
        for name, p in engine.weights.items():
            assert_same_bits(p, weights[name])
        assert (engine.weight_version, engine.digest()) == (version, digest)
        assert served(engine) == truth


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
def test_a_released_engine_refuses_and_names_the_tag(make_engine, truth, tag):
    engine = make_engine(weights_backup=True)
    engine.release_memory_occupation([tag])
    message = f"the memory of {tag} is released; resume it first"
    for ask in (
        lambda: engine.generate(PROMPTS, PARAMS),
        lambda: engine.score(PROMPTS),
        lambda: engine.add_request(PROMPTS[0], PARAMS),
    ):
        with pytest.raises(WeightSyncError, match=message):
            ask()
    assert not engine.has_unfinished_requests
    engine.resume_memory_occupation([tag])
    assert served(engine) == truth


def test_weights_that_are_released_are_neither_read_nor_updated(make_engine, truth, qwen3_path):
    engine = make_engine(weights_backup=True)
    weights = {name: p.clone() for name, p in engine.weights.items()}
    engine.release_memory_occupation(["weights"])
    with pytest.raises(ReleasedError, match="memory of weights is released"):
        engine.digest()
    with pytest.raises(ReleasedError, match="memory of weights is released"):
        engine.get_weights_by_name("decoder.final_layernorm.weight")
    for update in (
        lambda: engine.copy_weights(weights, step=1),
        lambda: engine.update_weights_from_disk(qwen3_path),
        lambda: engine.sink.begin(1),
    ):
        with pytest.raises(WeightSyncError, match="the memory of weights is released"):
            update()
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_weights_without_a_backup_need_a_full_update(make_engine, truth):
    engine = make_engine()
    weights = {name: p.clone() for name, p in engine.weights.items()}
    engine.release_memory_occupation()
    engine.resume_memory_occupation(["kv_cache", "cuda_graphs"])
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(WeightSyncError, match="released without a backup; .*full update"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights(weights, step=1)
    assert served(engine) == truth


def test_weights_are_updated_while_the_kv_cache_is_released(make_engine, truth):
    """Weights first, so that there is room for what sends them; then the KV cache."""
    engine = make_engine()
    weights = {name: p.clone() for name, p in engine.weights.items()}
    engine.release_memory_occupation()
    engine.resume_memory_occupation(["weights"])
    engine.copy_weights(weights, step=1)
    with pytest.raises(WeightSyncError, match="the memory of kv_cache is released"):
        engine.generate(PROMPTS, PARAMS)
    engine.resume_memory_occupation(["kv_cache"])
    assert served(engine) == truth


def test_released_keys_and_values_are_no_cached_prefix(make_engine, truth):
    engine = make_engine(page_size=16)
    assert served(engine) == truth
    assert engine.pool.num_free < engine.pool.num_pages
    engine.release_memory_occupation(["kv_cache"])
    assert engine.pool.num_free == engine.pool.num_pages
    engine.resume_memory_occupation(["kv_cache"])
    assert engine.prefixes.match(PROMPTS[0]) == []
    assert served(engine) == truth


@pytest.mark.leaves_requests
def test_unfinished_requests_are_not_taken_their_memory(make_engine):
    engine = make_engine()
    engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    with pytest.raises(WeightSyncError, match="needs an idle engine: 1 requests are unfinished"):
        engine.release_memory_occupation()
    assert engine.arena.released == ()


@pytest.mark.parametrize("tags", [["kv_cache"], None])
def test_pages_of_paused_requests_are_kept(make_engine, tags):
    """They go on as if nothing had been, and nothing is computed anew."""
    settings = {"page_size": 16, "kv_cache_tokens": 320, "weights_backup": True}
    plain, engine = make_engine(**settings), make_engine(**settings)
    for own in (plain, engine):
        own.generate([PROMPTS[0]], PARAMS)  # prefixes that are shared with what follows
        for prompt in PROMPTS:
            own.add_request(prompt, LONG, [7])
        for _ in range(5):
            own.step()
    engine.pause_generation("keep")
    computed = engine.scheduler.num_running
    engine.release_memory_occupation(tags)
    assert int(torch.stack([k.count_nonzero() for k in engine.runner.cache.keys]).sum()) == 0
    engine.resume_memory_occupation(tags)
    assert engine.scheduler.num_running == computed == 2
    engine.continue_generation()
    assert run_to_end(engine) == run_to_end(plain)


def test_a_release_that_breaks_off_keeps_what_is_there(make_engine, truth, monkeypatch):
    """Not the KV pages of that moment, which go on changing, nor a word that weights are lost."""
    settings = {"page_size": 16, "kv_cache_tokens": 320}
    plain, engine = make_engine(**settings), make_engine(**settings)
    for own in (plain, engine):
        for prompt in PROMPTS:
            own.add_request(prompt, LONG, [7])
        for _ in range(3):
            own.step()
    engine.pause_generation("keep")

    def broken(*_, **__):
        raise RuntimeError("not now")

    for owner, name in ((engine.arena, "release"), (KVCache, "read_pages")):
        monkeypatch.setattr(owner, name, broken)
        with pytest.raises(RuntimeError, match="not now"):
            engine.release_memory_occupation()
        monkeypatch.undo()
    engine.continue_generation()
    for _ in range(3):
        engine.step()
    engine.resume_memory_occupation()
    assert run_to_end(engine) == run_to_end(plain)
    assert served(engine) == truth


def test_pages_that_cannot_be_written_back_are_kept(make_engine, monkeypatch):
    settings = {"page_size": 16, "kv_cache_tokens": 320}
    plain, engine = make_engine(**settings), make_engine(**settings)
    for own in (plain, engine):
        own.add_request(PROMPTS[0], LONG, [7])
        own.step()
    engine.pause_generation("keep")
    engine.release_memory_occupation(["kv_cache"])
    for error, told in ((torch.OutOfMemoryError, ResumeError), (KeyboardInterrupt,) * 2):
        monkeypatch.setattr(KVCache, "write_pages", Mock(side_effect=error("no room")))
        with pytest.raises(told):
            engine.resume_memory_occupation()
        monkeypatch.undo()
        assert engine.arena.released == ("kv_cache",)
        with pytest.raises(WeightSyncError, match="memory of kv_cache is released"):
            engine.continue_generation()
    engine.resume_memory_occupation()
    engine.continue_generation()
    assert run_to_end(engine) == run_to_end(plain)


def test_memory_that_the_trainer_owns_is_not_released(make_engine, truth):
    engine = make_engine()
    memory = {name: p.clone() for name, p in engine.weights.items()}
    engine.bind_weights(memory, step=3)
    done = engine.release_memory_occupation(["weights", "kv_cache"])
    assert done["weights"] == 0
    assert done["kv_cache"] > 0
    assert engine.digest() == engine.weight_version.digest
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_a_binding_forgets_no_released_tag(make_engine, truth):
    engine = make_engine()
    memory = {name: p.clone() for name, p in engine.weights.items()}
    engine.release_memory_occupation(["kv_cache"])
    engine.bind_weights(memory, step=3)
    with pytest.raises(WeightSyncError, match="the memory of kv_cache is released"):
        engine.generate(PROMPTS, PARAMS)
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_released_weights_are_not_bound(make_engine, truth):
    """They are zeros, or nothing at all."""
    engine = make_engine(weights_backup=True)
    engine.release_memory_occupation(["weights"])
    with pytest.raises(ReleasedError, match="memory of weights is released"):
        engine.bind_weights(dict(engine.weights), 3)
    engine.resume_memory_occupation()
    assert served(engine) == truth


def test_weights_under_update_are_not_released(make_engine, truth):
    engine = make_engine(weights_backup=True)
    weights = {name: p.clone() for name, p in engine.weights.items()}
    engine.sink.begin(1)
    with pytest.raises(WeightSyncError, match="memory of weights cannot be released: an update"):
        engine.release_memory_occupation()
    assert engine.arena.released == ()
    engine.release_memory_occupation(["kv_cache"])  # room for the update
    engine.sink.abort("no more")
    engine.resume_memory_occupation()
    engine.copy_weights(weights, step=1)
    assert served(engine) == truth


def test_a_resume_without_room_is_told_and_repeated(make_engine, truth, monkeypatch):
    engine = make_engine(weights_backup=True)
    size = engine.arena.num_bytes("kv_cache")
    engine.release_memory_occupation()
    own_map = HostMemory.map

    def fail_on_kv(memory):
        if memory is engine.arena._memories["kv_cache"]:
            raise torch.OutOfMemoryError
        own_map(memory)

    monkeypatch.setattr(HostMemory, "map", fail_on_kv)
    with pytest.raises(ResumeError, match=rf"GiB \({size} bytes\) of tag kv_cache wanted"):
        engine.resume_memory_occupation()
    with pytest.raises(WeightSyncError, match="the memory of kv_cache is released"):
        engine.generate(PROMPTS, PARAMS)
    monkeypatch.undo()
    assert engine.resume_memory_occupation()["kv_cache"] == size
    assert served(engine) == truth


def test_doubled_calls_do_nothing_and_say_so(make_engine, truth):
    engine = make_engine(weights_backup=True)
    size, nothing = sizes(engine), dict.fromkeys(TAGS, 0)
    assert engine.resume_memory_occupation() == nothing
    assert engine.release_memory_occupation() == size
    assert engine.release_memory_occupation() == nothing
    assert engine.resume_memory_occupation() == size
    assert engine.resume_memory_occupation() == nothing
    assert served(engine) == truth


def test_memory_is_every_ranks_and_not_released_while_rank_0_leads(make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.loop.book.lockstep, "leads", True)
    for call in (engine.release_memory_occupation, engine.resume_memory_occupation):
        with pytest.raises(RuntimeError, match="_memory_occupation is for every rank: call it aft"):
            call()
    assert engine.arena.released == ()


@pytest.mark.parametrize("tags", [["kv"], ["weights", "gradients"], "weights", 7])
def test_unknown_tags_are_refused(make_engine, tags):
    engine = make_engine()
    wrong = tags[-1] if isinstance(tags, list) else tags
    message = re.escape(f"tags has {wrong!r}; give a list of: {', '.join(TAGS)}")
    with pytest.raises(ValueError, match=message):
        engine.release_memory_occupation(tags)
    with pytest.raises(ValueError, match=message):
        engine.resume_memory_occupation(tags)
    assert engine.arena.released == ()


def test_tags_as_frameworks_give_them(make_engine, truth):
    """None are all, and the graphs' has SGLang's name as well."""
    engine = make_engine(weights_backup=True)
    size = sizes(engine)
    assert engine.release_memory_occupation([]) == size
    assert engine.resume_memory_occupation(()) == size
    assert list(engine.release_memory_occupation(["kv_cache", "cuda_graph"])) == TAGS[1:3]
    assert list(engine.resume_memory_occupation(["cuda_graph"])) == TAGS[2:3]
    engine.resume_memory_occupation(["cuda_graph", "kv_cache"])
    assert served(engine) == truth


def test_an_engine_of_ordinary_memory_refuses(make_engine, truth):
    engine = make_engine(releasable=False)
    with pytest.raises(ReleasedError, match="releasable=false"):
        engine.release_memory_occupation()
    assert served(engine) == truth


def test_an_engine_in_another_process_does_the_same(qwen3_path, truth):
    remote = RemoteEngine(qwen3_path, weights_backup=True)
    try:
        done = remote.release_memory_occupation()
        assert done["weights"] > 0
        with pytest.raises(WeightSyncError, match="memory of weights, kv_cache is released"):
            remote.generate(PROMPTS, PARAMS)
        assert remote.resume_memory_occupation() == done
        assert remote.memory_occupation() == {t: (n, n) for t, n in done.items() if n}
        assert (outcomes(remote.generate(PROMPTS, PARAMS)), remote.score(PROMPTS)) == truth
    finally:
        remote.close()
