"""A CPU runner whose results are as late as a GPU's, for the steps in flight of the engine.

What a step gives is unreadable until it is waited for; so are, even then, the rows of sequences
that have ended meanwhile. Steps fail, or give NaN, where a test says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from helpers import assert_same_bits

from samebit.rollout.runtime.runner import Outcome, Runner

VOCAB = 40  # of the model of the fixtures `plain` and `make_late`


class FaultError(RuntimeError):
    """What a step raises that was told to fail."""


@dataclass(frozen=True, kw_only=True)
class LateOutcome(Outcome):
    """Poison in place of what `arriving` holds, until it is waited for."""

    arriving: Outcome
    on_wait: Callable[[np.ndarray, np.ndarray], None]  # gets token ids and log-probs to change

    def wait(self):
        """The results, once."""
        token_ids, logprobs, *others = self.arriving.wait()
        token_ids, logprobs = token_ids.copy(), logprobs.copy()
        self.on_wait(token_ids, logprobs)
        for layer, states in self.arriving.collected.items():
            self.collected[layer].copy_(states)
        return token_ids, logprobs, *others


def _poison(values):
    if values is None:
        return None
    return torch.full_like(values, torch.nan if values.is_floating_point() else -1)


class LateRunner(Runner):
    """The real runner with late results.

    events: ("launch" or "wait", step), steps counted from 0. fails: those that raise `error`. nans:
    steps with a NaN for the first sequence that has not ended; num_faults counts both.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []
        self.fails = set()
        self.error = FaultError
        self.nans = set()
        self.num_faults = 0
        self.on_launch = lambda number: None

    def launch(self, step, slots, sampler):
        """Compute at once; a GPU, too, keeps the order of what it was told."""
        number = sum(kind == "launch" for kind, _ in self.events)
        self._pass("launch", number)
        self.on_launch(number)
        owners = [slots.seqs[slot] for slot in step.decode]
        outcome = super().launch(step, slots, sampler)

        def on_wait(token_ids, logprobs):
            self._pass("wait", number)
            ended = np.array([seq.finish_reason is not None for seq in owners], dtype=bool)
            token_ids[: len(owners)][ended], logprobs[: len(owners)][ended] = -1, np.nan
            if number in self.nans and not ended.all():
                self.num_faults += 1
                logprobs[np.flatnonzero(~ended)[0]] = np.nan

        return LateOutcome(
            token_ids=_poison(outcome.token_ids),
            logprobs=_poison(outcome.logprobs),
            scores=_poison(outcome.scores),
            done=None,
            collected={layer: _poison(states) for layer, states in outcome.collected.items()},
            arriving=outcome,
            on_wait=on_wait,
        )

    def _pass(self, kind, number):
        assert (kind, number) not in self.events
        self.events.append((kind, number))
        if (kind, number) in self.fails:
            self.num_faults += 1
            raise self.error(f"{kind} {number}")


def assert_same(found, truth, layers=(), case=""):
    """Completions of one prompt, to the bit, but for the request's name."""
    for a, b in zip(found, truth, strict=True):
        assert a.token_ids == b.token_ids, case
        assert a.logprobs == b.logprobs, case
        assert (a.sample_id, a.finish_reason) == (b.sample_id, b.finish_reason), case
        assert a.version_spans == b.version_spans, case
        assert set(a.hidden_states) == set(layers)
        for layer in layers:
            assert_same_bits(a.hidden_states[layer], b.hidden_states[layer], (case, layer))


def assert_idle(engine):
    """Nothing runs, and nobody holds a page."""
    assert not engine.has_unfinished_requests
    assert engine.scheduler.num_running == 0
    engine.flush_cache()
    assert engine.pool.num_free == engine.pool.num_pages


def run_to_end(engine):
    """Completions by request id."""
    found = {}
    while engine.has_unfinished_requests:
        found |= {group[0].request_id: group for group in engine.step()}
    return found
