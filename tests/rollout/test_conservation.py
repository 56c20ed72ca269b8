"""Lies that the promise hides from tokens, or shows to one reader alone: stale keys in the cache,
pages that leak, and work that waits for ever."""

import random
import weakref
from collections import Counter

import pytest
from conservation import check_books
from counting import VERSION, World
from helpers import make_prompts, outcomes

from samebit.rollout.types import SamplingParams

PROMPTS = make_prompts(5, 21, 37)
FREE = SamplingParams(max_new_tokens=11, ignore_eos=True)


def run_to_end(engine, limit=300):
    """Completions by request id; the books are right after every step."""
    found = {}
    for _ in range(limit):
        if not engine.has_unfinished_requests:
            return found
        found |= {group[0].request_id: group for group in engine.step()}
        check_books(engine)
    raise AssertionError("the engine hangs")


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_the_books_of_random_worlds(depth, cached):
    """Forks, stops, preemption, aborts and failures over a model that only counts: whatever comes,
    every page, slot and sample has its owner, and all samples end."""
    rng, events = random.Random(3), Counter()
    for _ in range(40):
        limits = {"max_batch_tokens": rng.choice([4, 30]), "max_num_seqs": rng.choice([2, 4, 9])}
        world = World(rng.choice([6, 9, 30]), cached, depth, prefill_chunk=7, **limits)
        seqs = []
        while len(seqs) < 16 or world.scheduler.has_unfinished:
            chance = rng.random()
            if len(seqs) < 16 and chance < 0.5:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 13))]
                stops = rng.choice([(), (), (7,)])
                max_new = rng.randrange(1, 12)
                seqs += world.add(prompt, max_new, rng.choice([1, 2, 5]), stop_token_ids=stops)
            elif chance < 0.55 and world.live:
                events["aborts"] += len(world.abort(rng.choice(list(world.live))))
            elif chance < 0.6:
                world.runner.fails = True
            try:
                world.step()
            except RuntimeError:
                events["failures"] += 1
            check_books(world)
        events["preemptions"] += world.scheduler.num_preemptions
        for seq in seqs:
            full = 1 if seq.request.params.stop_token_ids else seq.request.params.max_new_tokens
            if seq.finish_reason == "abort":
                assert seq.num_new_tokens < full
            else:
                assert seq.num_new_tokens == full
        if cached:
            events["hits"] += world.prefixes.num_hit_tokens
            world.prefixes.reset(VERSION)
        assert world.pool.num_free == world.pool.num_pages
    assert set(+events) == {"aborts", "failures", "preemptions", *(["hits"] if cached else [])}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_new", [10, 11, 12])
def test_the_next_turn_after_a_page_that_ends_with_the_last_token(
    make_engine, engine, overlap, num_new
):
    """5 + 11 tokens are one page, but the last one has no keys yet: the page may not be found."""
    own = make_engine(page_size=16, overlap=overlap)
    [[first]] = own.generate(PROMPTS[:1], SamplingParams(max_new_tokens=num_new, ignore_eos=True))
    turn = [[*PROMPTS[0], *first.token_ids, *PROMPTS[1][:8]]]
    hits = own.prefixes.num_hit_tokens
    assert outcomes(own.generate(turn, FREE)) == outcomes(engine.generate(turn, FREE))
    assert own.prefixes.num_hit_tokens - hits == (16 if num_new == 12 else 0)


def test_a_first_token_that_fills_a_page_is_not_cached(make_engine, engine):
    """15 tokens and the one that ends the completion at once."""
    own = make_engine(page_size=16)
    prompt = PROMPTS[1][:15]
    [[first]] = own.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
    turn = [[*prompt, *first.token_ids, 5]]
    assert outcomes(own.generate(turn, FREE)) == outcomes(engine.generate(turn, FREE))
    assert own.prefixes.num_hit_tokens == 0


def test_bound_weights_find_no_prefix_of_the_old_ones(make_engine):
    """Warm caches on both sides; and the engine's own memory goes with the old weights."""
    engine, fresh = make_engine(page_size=16), make_engine(page_size=16)
    engine.generate(PROMPTS, FREE)
    doubled = {name: w * 1.5 for name, w in engine.weights.items()}
    old = [weakref.ref(w) for w in engine.weights.values()]
    engine.bind_weights(doubled, 1)
    fresh.bind_weights(doubled, 1)
    assert [ref() for ref in old] == [None] * len(old)
    assert engine.pool.num_free == engine.pool.num_pages
    assert outcomes(engine.generate(PROMPTS, FREE)) == outcomes(fresh.generate(PROMPTS, FREE))


def test_a_large_prompt_comes_in_after_branches_were_given_up(make_engine, engine):
    """All that the cache holds can be freed, in whatever order it was used: nobody waits for ever.

    The stem's page was looked at after a branch that was in use then and is not any more.
    """
    own = make_engine(page_size=16, kv_cache_tokens=128)
    stem, other, large = make_prompts(16, 16, 110, seed=4)
    once = SamplingParams(max_new_tokens=1)
    doomed = own.add_request([*stem, *stem, 1], FREE)  # two full pages stay in use
    own.step()
    own.generate([[*other, 1]], once)
    own.generate([[*stem, *other, 1]], once)
    own.generate([PROMPTS[2]], once)  # evicts the page of `other`, and no more
    own.abort_request(doomed)
    request = own.add_request(large, FREE, [0])
    assert outcomes([run_to_end(own)[request]]) == outcomes(engine.generate([large], FREE))


@pytest.mark.parametrize("cached", [True, False])
def test_forks_without_room_give_their_pages_back(make_engine, engine, cached):
    """Seven pages; a prompt of three and its samples' own pages: some have to wait."""
    own = make_engine(page_size=16, kv_cache_tokens=112, prefix_cache=cached)
    params = SamplingParams(n=8, max_new_tokens=20, ignore_eos=True)
    request = own.add_request(PROMPTS[2], params, range(8))
    own.step()
    check_books(own)
    assert own.scheduler.num_running == 5
    assert outcomes([run_to_end(own)[request]]) == outcomes(engine.generate([PROMPTS[2]], params))


@pytest.mark.leaves_requests
def test_a_refused_update_counts_requests_not_samples(make_engine):
    own = make_engine(max_num_seqs=4)
    for prompt in PROMPTS:
        own.add_request(prompt, SamplingParams(n=3, max_new_tokens=5, ignore_eos=True))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="idle engine: 3 requests are unfinished"):
            own.sink.begin(1)
        own.step()


def test_kv_capacity_by_default(make_engine):
    """Keys and values of 3 layers, 2 heads, 16 numbers of 4 bytes are 768 bytes a token: what all
    sequences can need, within 1 GiB, in whole pages."""
    assert make_engine(max_num_seqs=3, max_model_len=100).kv_capacity == 256
    assert make_engine(max_num_seqs=4096).kv_capacity == (1 << 30) // 768 // 64 * 64
