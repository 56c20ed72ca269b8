"""A scheduler over a model that only counts: what is planned, without what is computed."""

import itertools
from types import SimpleNamespace

import torch

from samebit.rollout.config import EngineConfig
from samebit.rollout.runtime.kv_cache import PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.request_book import LiveRequest
from samebit.rollout.runtime.runner import Outcome
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step_loop import StepLoop
from samebit.rollout.types import Request, SamplingParams
from samebit.weight_sync.types import WeightVersion

PAGE = 4
VERSION = WeightVersion(0, "a")


class CountingRunner:
    """A model that "computes" by counting: it draws one `token` everywhere."""

    def __init__(self, slots):
        self.slots = slots
        self.steps = []
        self.token = 7
        self.fails = False  # the next step

    def launch(self, step, slots, sampler):
        """Results for every row that asks for one."""
        assert slots is self.slots
        if self.fails:
            self.fails = False
            raise RuntimeError("the chip caught fire")
        self.steps.append(step)
        for slot in step.decode:
            assert slots.num_pages[slot] * PAGE > slots.computed[slot]
        for chunk in step.chunks:
            assert len(chunk.seq.pages) * PAGE >= chunk.start + chunk.num_tokens
        num_drawn = len(step.decode) + sum(len(c.drawing) for c in step.chunks)
        num_scored = sum(c.num_tokens for c in step.chunks if c.scores)
        return Outcome(
            torch.full((num_drawn,), self.token),
            -torch.ones(num_drawn),
            -torch.ones(num_scored),
            None,
        )


class World:
    """A scheduler in a pipeline over the counting runner. depth: steps in flight."""

    def __init__(self, num_pages=16, cached=False, depth=0, **settings):
        config = EngineConfig(page_size=PAGE, **settings)
        self.pool = PagePool(num_pages)
        self.config = config
        self.prefixes = PrefixCache(self.pool, PAGE, VERSION) if cached else None
        self.slots = Slots(config.max_num_seqs, 64, PAGE, seed=0)
        self.scheduler = Scheduler(config, self.pool, self.prefixes, self.slots, None)
        self.runner = CountingRunner(self.slots)
        sampler = Sampler(331, ())
        self.step_loop = StepLoop(self.scheduler, self.slots, self.runner, sampler, depth)
        self.version = VERSION  # of the steps to come
        self.arrivals = 0
        # As an engine's book, for check_books.
        self.loop = SimpleNamespace(book=self)
        self.live, self.calls, self._streams = {}, {}, {}

    def add(self, prompt, max_new=4, n=1, score=False, **params):
        """Queue a request; its sequences."""
        request = Request(
            request_id=str(self.arrivals),
            prompt_ids=tuple(prompt),
            params=SamplingParams(n=n, max_new_tokens=max_new, **params),
            sample_ids=tuple(range(n)),
            score_only=score,
        )
        seqs = RunningSample.of(request, itertools.count(self.arrivals))
        self.arrivals += n
        self.scheduler.add(seqs[0])
        self.live[request.request_id] = LiveRequest(seqs, None)
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
            self.step_loop.advance(self.version)
        finally:
            self.runner.launch = original
            self._forget_finished()
        return summary

    def abort(self, request_id):
        """End a request as an engine does; the samples that it had left."""
        self.step_loop.drain()
        aborted = self.scheduler.abort(request_id)
        self._forget_finished()
        return aborted

    def _forget_finished(self):
        self.live = {
            name: request
            for name, request in self.live.items()
            if any(seq.finish_reason is None for seq in request.samples)
        }

    def run(self, limit=500):
        """Steps until all is done."""
        steps = []
        while self.scheduler.has_unfinished:
            steps.append(self.step())
            assert len(steps) < limit, "the engine would hang"
        return [step for step in steps if step]
