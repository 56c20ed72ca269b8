"""Budgets, order, preemption and pages of the scheduler; and that no page is ever lost."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.rollout.config import EngineConfig
from samebit.rollout.runtime.kv_cache import PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.runner import Outcome
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.sequence import Sequence
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step import Pipeline
from samebit.rollout.types import Request, SamplingParams
from samebit.weight_sync.types import WeightVersion

PAGE = 4
VERSION = WeightVersion(0, "a")


class CountingRunner:
    """A model that "computes" by counting: it draws token 7 everywhere."""

    def __init__(self, slots):
        self.slots = slots
        self.steps = []

    def launch(self, step, slots, sampler):
        """Results for every row that asks for one."""
        assert slots is self.slots
        self.steps.append(step)
        for slot in step.decode:
            assert slots.num_pages[slot] * PAGE > slots.computed[slot]
        for chunk in step.chunks:
            assert len(chunk.seq.pages) * PAGE >= chunk.start + chunk.num_tokens
        num_drawn = len(step.decode) + sum(len(c.drawing) for c in step.chunks)
        num_scored = sum(c.num_tokens for c in step.chunks if c.scores)
        return Outcome(
            torch.full((num_drawn,), 7), -torch.ones(num_drawn), -torch.ones(num_scored), None
        )


class World:
    """A scheduler in a pipeline over the counting runner. depth: steps in flight."""

    def __init__(self, num_pages=16, cached=False, depth=0, **settings):
        config = EngineConfig(
            model_path=Path("none"),
            device=torch.device("cpu"),
            dtype=torch.float32,
            page_size=PAGE,
            **settings,
        )
        self.pool = PagePool(num_pages)
        prefixes = PrefixCache(self.pool, PAGE, VERSION) if cached else None
        self.slots = Slots(config.max_num_seqs, 64, PAGE, seed=0)
        self.scheduler = Scheduler(config, self.pool, prefixes, self.slots)
        self.runner = CountingRunner(self.slots)
        sampler = Sampler(331, ())
        self.pipeline = Pipeline(self.scheduler, self.slots, self.runner, sampler, depth)
        self.arrivals = 0

    def add(self, prompt, max_new=4, n=1, score=False, **params):
        """Queue a request; its sequences."""
        request = Request(
            request_id=str(self.arrivals),
            prompt_ids=tuple(prompt),
            params=SamplingParams(n=n, max_new_tokens=max_new, **params),
            sample_ids=tuple(range(n)),
            score_only=score,
        )
        seqs = [
            Sequence(request=request, index=i, arrival=self.arrivals + i, token_ids=list(prompt))
            for i in range(n)
        ]
        self.arrivals += n
        seqs[0].siblings = seqs[1:]
        self.scheduler.add(seqs[0])
        return seqs

    def step(self):
        """One step; what was scheduled as (arrival, number of tokens, arrivals of forks)."""
        slots, summary = self.slots, []
        original = self.runner.launch

        def launch(step, *arguments):
            summary.extend((int(slots.arrival[slot]), 1, []) for slot in step.decode)
            for c in step.chunks:
                forks = [s.arrival for s in c.siblings if s.slot is not None]
                summary.append((c.seq.arrival, c.num_tokens, forks))
            self.copies = [copy for c in step.chunks for copy in c.copies]
            return original(step, *arguments)

        self.runner.launch = launch
        try:
            self.pipeline.advance(VERSION)
        finally:
            self.runner.launch = original
        return summary

    def run(self, limit=500):
        """Steps until all is done."""
        steps = []
        while self.scheduler.has_unfinished:
            steps.append(self.step())
            assert len(steps) < limit, "the engine would hang"
        return [step for step in steps if step]


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
    assert [s.num_computed for s in seqs[1:]] == [6, 6]


def test_a_prompt_of_whole_pages_needs_no_copy():
    world = World()
    seqs = world.add([1] * 8, n=3, max_new=3)
    assert world.step() == [(0, 8, [1, 2])]
    assert world.copies == []
    assert len({tuple(s.pages) for s in seqs}) == 1


def test_samples_that_find_no_room_wait_their_turn():
    world = World(max_num_seqs=2)
    seqs = world.add([1] * 6, n=5, max_new=3)
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
    for prompt in ([1] * 9, [1] * 9, [1] * 6):
        world.add(prompt, max_new=1)
    assert world.step() == [(0, 9, []), (1, 9, []), (2, 6, [])]
    world.add([1] * 9, max_new=1)
    world.add([1] * 8, max_new=1)
    assert world.step() == [(3, 1, []), (4, 4, [])]


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
