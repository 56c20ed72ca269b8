"""Budgets, order, preemption and pages of the scheduler; and that no page is ever lost."""

import random
from contextlib import suppress

import pytest
from counting import PAGE, World
from helpers import make_prompts, outcomes

from samebit.rollout.types import SamplingParams


def test_prefill_then_decode():
    world = World()
    world.add([1] * 5, max_new=3)
    assert world.run() == [[(0, 5, [])], [(0, 1, [])], [(0, 1, [])]]
    assert world.pool.num_free == 16


def test_chunks_and_the_token_budget():
    world = World(prefill_chunk=6, max_batch_tokens=8)
    world.add([1] * 10, max_new=1)
    world.add([2] * 5, max_new=1)
    assert world.run() == [[(0, 6, []), (1, 2, [])], [(0, 4, []), (1, 3, [])]]


def test_running_sequences_go_before_new_ones():
    """Decode is never starved by prompts that keep arriving."""
    world = World(max_batch_tokens=4)
    world.add([1] * 3, max_new=5)
    world.step()
    world.add([2] * 9, max_new=1)
    assert [world.step() for _ in range(3)] == [[(0, 1, []), (1, 3, [])]] * 3


def test_no_more_sequences_than_allowed():
    world = World(max_num_seqs=2)
    for _ in range(5):
        world.add([1, 2], max_new=2)
    while world.scheduler.has_unfinished:
        world.step()
        assert world.scheduler.num_running <= 2
    assert world.pool.num_free == 16


def test_samples_fork_from_one_prefill():
    """They share the full pages and copy the rest."""
    world = World()
    seqs = world.add([1] * 6, n=3, max_new=3)
    assert world.step() == [(0, 6, [1, 2])]
    first = seqs[0].pages
    assert [s.pages[0] for s in seqs] == [first[0]] * 3
    assert world.pool.references(first[0]) == 3
    assert world.copies == [(first[1], s.pages[1]) for s in seqs[1:]]
    assert len({s.pages[1] for s in seqs}) == 3
    assert [world.slots.num_computed(s) for s in seqs[1:]] == [6, 6]


def test_a_prompt_of_whole_pages_needs_no_copy():
    world = World()
    seqs = world.add([1] * 8, n=3, max_new=3)
    assert world.step() == [(0, 8, [1, 2])]
    assert world.copies == []
    assert len({tuple(s.pages) for s in seqs}) == 1


def test_samples_that_find_no_room_wait_their_turn():
    world = World(max_num_seqs=2)
    seqs = world.add([1] * 6, n=5, max_new=3)
    assert world.step() == [(0, 6, [1])]
    world.run()
    assert [s.num_new_tokens for s in seqs] == [3] * 5
    assert world.pool.num_free == 16


@pytest.mark.parametrize("cached", [False, True])
def test_the_latest_arrival_is_preempted_and_comes_back(cached):
    """Six pages, three sequences that need three each: all finish, the first ones first."""
    world = World(num_pages=6, cached=cached)
    seqs = [world.add([i] * 6, max_new=6)[0] for i in range(3)]
    finished = []
    while world.scheduler.has_unfinished:
        assert world.step()
        finished += [s.arrival for s in seqs if s.finish_reason and s.arrival not in finished]
    assert finished == [0, 1, 2]
    assert world.scheduler.num_preemptions > 0
    assert [s.num_new_tokens for s in seqs] == [6] * 3


def test_one_sequence_may_take_all_pages():
    world = World(num_pages=4)
    seqs = [world.add([i] * 8, max_new=8)[0] for i in range(3)]
    world.run()
    assert [s.num_new_tokens for s in seqs] == [8] * 3
    assert world.pool.num_free == 4


def test_cached_pages_make_room_before_anyone_is_preempted():
    world = World(num_pages=6, cached=True)
    for i in range(4):
        world.add([i] * 8, max_new=8)
        world.run()
    assert world.scheduler.num_preemptions == 0
    assert world.pool.num_free < 6


def test_scores_are_computed_whole():
    """Every position's logits are asked for, so a cached prefix is no use; the last token's not."""
    world = World(cached=True)
    world.add([1] * 9, max_new=1)
    world.run()
    world.add([1] * 9, score=True)
    assert world.run() == [[(1, 8, [])]]


def test_a_cached_prefix_is_skipped():
    world = World(cached=True)
    world.add([1] * 9, max_new=1)
    assert world.step() == [(0, 9, [])]
    world.add([1] * 9, max_new=1)
    world.add([1] * 8, max_new=1)
    assert world.step() == [(1, 1, []), (2, 4, [])]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_abort_takes_all_samples_and_pages(steps, n):
    world = World(prefill_chunk=4)
    doomed = world.add([1] * 6, n=n, max_new=9)
    other = world.add([2] * 6, max_new=9)
    for _ in range(steps):
        world.step()
    assert set(world.scheduler.abort("0")) == set(doomed)
    assert world.scheduler.abort("0") == []
    world.run()
    assert other[0].num_new_tokens == 9
    assert world.pool.num_free == 16


def test_abort_of_a_preempted_sequence():
    world = World(num_pages=6)
    seqs = [world.add([i] * 6, max_new=6)[0] for i in range(3)]
    while not world.scheduler.num_preemptions:
        world.step()
    assert world.scheduler.abort("2") == [seqs[2]]
    world.run()
    assert world.pool.num_free == 6


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_pages": 6}, {"max_num_seqs": 2}], ids=str)
def test_steps_in_flight_change_no_completion(settings, cached):
    """The same tokens whether results are awaited or not, in no more than one step more each."""
    counts = []
    for depth in (0, 1, 2):
        world = World(cached=cached, depth=depth, **settings)
        seqs = [s for i in range(4) for s in world.add([i] * 6, n=2, max_new=5)]
        world.run()
        assert [s.num_new_tokens for s in seqs] == [5] * 8
        counts.append(sum(step.num_tokens for step in world.runner.steps))
    if not settings:
        assert len(set(counts)) == 1  # lengths are known: no step is in vain


def test_a_stop_token_costs_one_step_in_flight():
    """Everything stops at its first token; the step that was in flight is dropped."""
    for depth in (0, 1):
        world = World(depth=depth)
        seqs = world.add([1] * 6, n=3, max_new=9, stop_token_ids=(7,))
        world.run()
        assert [(s.num_new_tokens, s.finish_reason) for s in seqs] == [(1, "stop")] * 3
        assert [len(step.decode) for step in world.runner.steps] == [0, 3][: depth + 1]
        assert world.pool.num_free == 16
        assert world.slots.num_used == 0


def running(world):
    """Arrivals of those that hold a slot."""
    return {seq.arrival for seq in world.slots.seqs if seq is not None}


def shares_a_page(seq, earlier):
    prompt = seq.request.prompt_ids
    return len(prompt) > PAGE and any(s.request.prompt_ids[:PAGE] == prompt[:PAGE] for s in earlier)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_limits_and_order_hold_at_every_step(depth, cached):
    """Random requests in random worlds: budgets are kept, earlier arrivals go first but for those
    that wait for pages, and who is preempted came after all that stay, and does not come back at
    once."""
    rng, num_preemptions = random.Random(7), 0
    for _ in range(25):
        limits = {
            "max_batch_tokens": rng.choice([3, 8, 40]),
            "max_num_seqs": rng.choice([2, 3, 9]),
            "prefill_chunk": rng.choice([2, 5, 40]),
        }
        world = World(rng.choice([6, 8, 30]), cached=cached, depth=depth, **limits)
        seqs, begun = [], []
        while len(seqs) < 12 or world.scheduler.has_unfinished:
            if len(seqs) < 12 and rng.random() < 0.6:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 13))]
                max_new = rng.randrange(1, 12)
                seqs += world.add(prompt, max_new, rng.choice([1, 1, 4]))
            before, preemptions = running(world), world.scheduler.num_preemptions
            going = [s.arrival for s in seqs if s.finish_reason is None]
            planned, num_steps = world.step(), len(world.runner.steps)
            stay = before & running(world)
            gone = {i for i in before - stay if seqs[i].finish_reason is None}
            assert not gone or not stay or min(gone) > max(stay)
            assert len(gone) == world.scheduler.num_preemptions - preemptions
            num_preemptions += len(gone)
            assert len(running(world)) <= limits["max_num_seqs"]
            assert sum(num_tokens for _, num_tokens, _ in planned) <= limits["max_batch_tokens"]
            if planned:
                step = world.runner.steps[num_steps - 1]
                decode = [arrival for arrival, _, _ in planned[: len(step.decode)]]
                assert decode == sorted(decode)
                assert all(0 < c.num_tokens <= limits["prefill_chunk"] for c in step.chunks)
                old = [c.seq.arrival for c in step.chunks if c.seq.arrival in before]
                new = [c.seq.arrival for c in step.chunks if c.seq.arrival not in before]
                assert [c.seq.arrival for c in step.chunks] == sorted(old) + sorted(new)
                assert not gone or not new
                fresh = [i for i in new if seqs[i].index == 0 and i not in begun]
                begun += fresh
                firsts = {s.arrival for s in seqs[: max(fresh, default=0)] if s.index == 0}
                for i in firsts - set(begun):  # who was passed
                    assert cached
                    assert shares_a_page(seqs[i], [seqs[j] for j in going if j < i])
        assert all(s.num_new_tokens == s.request.params.max_new_tokens for s in seqs)
    assert num_preemptions > 20


def test_an_earlier_sample_takes_up_its_chunks_first():
    """The third request came in while the second one's other sample was on its way to the queue."""
    world = World(depth=1, max_num_seqs=2, prefill_chunk=2)
    world.add([1], max_new=1)
    world.add([2] * 4, n=2, max_new=2)
    world.add([3] * 14, max_new=1)
    steps = world.run()
    assert [s for s in steps if s[-1][0] == 2 and len(s) > 1][:1] == [[(3, 2, []), (2, 2, [])]]
    assert [(2, 2, []), (3, 2, [])] in steps


def test_a_fork_without_room_leaves_nothing_behind():
    """Three pages: the prompt's two and one sample's own; the third sample has to wait."""
    world = World(num_pages=3)
    seqs = world.add([1] * 6, n=3, max_new=3)
    assert world.step() == [(0, 6, [1])]
    assert [len(s.pages) for s in seqs] == [2, 2, 0]
    assert [world.pool.references(p) for p in seqs[0].pages] == [2, 1]
    assert world.scheduler.num_unfinished == 1
    world.run()
    assert [s.num_new_tokens for s in seqs] == [3] * 3
    assert world.pool.num_free == 3


# -- the same, in an engine ----------------------------------------------------------------------

PROMPTS = make_prompts(40, 5, 33, 70, 16)
PARAMS = SamplingParams(n=3, max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def truth(make_engine):
    return outcomes(make_engine().generate(PROMPTS, PARAMS))


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_tokens": 96},
        {"kv_cache_tokens": 96, "prefix_cache": False},
        {"kv_cache_tokens": 160, "max_num_seqs": 4},
        {"kv_cache_tokens": 160, "prefill_chunk": 9, "max_batch_tokens": 11},
        {"max_num_seqs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("overlap", [False, True])
def test_no_pages_are_lost_and_no_bit_moves(make_engine, truth, settings, overlap):
    """Preemption, eviction, forks that wait: everything free at the end, everything the same."""
    engine = make_engine(page_size=16, overlap=overlap, **settings)
    for _ in range(2):
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == truth
    assert engine.scheduler.num_preemptions > 0 or "kv_cache_tokens" not in settings
    engine.flush_cache()
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("steps", range(0, 16, 3))
@pytest.mark.parametrize("overlap", [False, True])
def test_aborts_at_any_moment_lose_no_pages(make_engine, truth, steps, overlap):
    """Running, waiting, preempted or half forked; a neighbour keeps its bits."""
    engine = make_engine(page_size=16, kv_cache_tokens=160, prefill_chunk=13, overlap=overlap)
    kept = engine.add_request(PROMPTS[0], PARAMS, [0, 1, 2])
    doomed = [engine.add_request(p, PARAMS) for p in PROMPTS[1:]]
    found = {}
    for _ in range(steps):
        found |= {g[0].request_id: g for g in engine.step()}
    for request in doomed:
        if request not in found:
            engine.abort_request(request)
    while engine.has_unfinished_requests:
        found |= {g[0].request_id: g for g in engine.step()}
    assert outcomes([found[kept]]) == truth[:1]
    engine.flush_cache()
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_step_loses_no_pages(make_engine, truth, monkeypatch, overlap):
    """An error out of the model: requests end, pages come back, the next call is right."""
    engine = make_engine(page_size=16, kv_cache_tokens=160, overlap=overlap)
    original, calls = engine.runner.forward, iter(range(1000))

    def forward(batch, collect, rows):
        if next(calls) == 9:
            raise RuntimeError("the chip caught fire")
        return original(batch, collect, rows)

    monkeypatch.setattr(engine.runner, "forward", forward)
    with pytest.raises(RuntimeError, match="caught fire"):
        engine.generate(PROMPTS, PARAMS)
    assert not engine.has_unfinished_requests
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == truth
    engine.flush_cache()
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("broken", ["forward", "draw"])
@pytest.mark.parametrize("when", [0, 1, 2, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_outlives_a_failing_step_is_right(
    make_engine, monkeypatch, broken, when, overlap
):
    """Samples may not go on from a prompt, page or row that was never computed."""
    params = SamplingParams(n=4, max_new_tokens=6, ignore_eos=True)
    prompt = list(range(1, 24))

    def finish(engine):
        engine.add_request(prompt, params)
        done = []
        while engine.has_unfinished_requests:
            with suppress(RuntimeError):
                done += engine.step()
        return outcomes(done)

    truth = finish(make_engine(page_size=16, prefill_chunk=10))
    engine = make_engine(page_size=16, prefill_chunk=10, overlap=overlap)
    owner = engine.runner if broken == "forward" else engine.sampler
    original, calls = getattr(owner, broken), iter(range(1000))

    def failing(*arguments):
        result = original(*arguments)
        if next(calls) == when:
            raise RuntimeError("the chip caught fire")
        return result

    monkeypatch.setattr(owner, broken, failing)
    assert finish(engine) == truth
