"""A long random workload against a simple model of the engine: whatever comes in whatever order,
every request gets what a plain engine gives it alone, and the books are right after every call.

By default the same programs every time. `make test-long` runs 1,000 others and shrinks what fails;
SAMEBIT_WORKLOAD_SEED repeats such a run.
"""

import os
import secrets
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import hypothesis
import pytest
from conservation import check_books, settle
from helpers import assert_same_bits
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.internal.constants_ast import Constants
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine
from samebit.rollout.speculative.proposer import Proposal, Proposer
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import VersionSpan, WeightSyncError, WeightVersion

SEED, NUM_PROGRAMS = 3, 20  # in which all comes about that is to be tried
EVENTS = {
    "aborts",
    "cached tokens",
    "failed updates",
    "failures",
    "forwards",
    "next turns",
    "preemptions",
    "right guesses",
    "refused updates",
    "updates",
}
VOCAB = 29
CAPACITY = 40  # tokens of the longest context
LONGEST = 32  # tokens of the longest prompt
STEM = [7, 3, 11, 3, 19, 5, 2, 23, 13, 28, 17, 9, 4, 4, 26, 1, 8, 21, 3, 15, 6, 12, 27, 10] * 2
PROMPTS = [
    STEM[:1],
    STEM[:8],
    STEM[:9],
    STEM[:16],
    [*STEM[:11], 8, *STEM[12:20]],
    STEM[:29],
    [2, *STEM[1:17]],
]
FREE = SamplingParams(max_new_tokens=8, ignore_eos=True)
PARAMS = [
    FREE,
    replace(FREE, n=3),
    replace(FREE, seed=5, max_new_tokens=5),
    replace(FREE, n=3, max_new_tokens=1),
    SamplingParams(n=2, max_new_tokens=7, stop_token_ids=(3, 5, 8), min_new_tokens=3),
    SamplingParams(max_new_tokens=8, temperature=0.0),
    SamplingParams(n=4, max_new_tokens=8, top_k=6, temperature=0.8, stop_token_ids=(4,)),
]
LAYERS = (0, 2)  # of the hidden states that are asked for
SETTINGS = {
    "page_size": [4, 1, 8],
    "kv_cache_tokens": [CAPACITY, 56, 400],
    "prefill_chunk": [64, 6],
    "max_num_seqs": [8, 3, 2],
    "max_batch_tokens": [64, 9],
    "prefix_cache": [True, True, True, False],
    "steps": ["one by one", "overlap", "guesses", "guesses and overlap"],
}


SETTINGS = {name: st.sampled_from(values) for name, values in SETTINGS.items()}


class Fire(RuntimeError):
    """What fails in the model's forward."""


class Oracle:
    """Plain engines, one for each set of weights: no cache, and one request at a time."""

    def __init__(self, folder):
        self.folder = folder
        original = {name: w.clone() for name, w in Engine(folder).weights.items()}
        self.weights = [{n: w * factor for n, w in original.items()} for factor in (1.0, 1.3)]
        self.engines = [Engine(folder, prefix_cache=False) for _ in self.weights]
        for engine, weights in zip(self.engines, self.weights, strict=True):
            engine.bind_weights(weights)
        self.known = {}

    def samples(self, which, prompt, params, ids):
        """What a request's samples must be, with all hidden states; which: index of the weights."""
        alone = replace(params, n=1)
        keys = [(which, tuple(prompt), alone, i) for i in ids]
        if new := [key[-1] for key in keys if key not in self.known]:
            [group] = self.engines[which].generate(
                [prompt], replace(params, n=len(new)), [new], return_hidden_states=LAYERS
            )
            self.known.update(((*keys[0][:-1], c.sample_id), c) for c in group)
        return [self.known[key] for key in keys]

    def score(self, which, token_ids, temperature):
        """Log-probs of given tokens."""
        return self.engines[which].score([token_ids], temperature)[0]


def assert_same(found, expected, version):
    """Two completions to the bit; of one given up, what there is of it."""
    length = len(found.token_ids)
    if found.finish_reason == "abort":
        assert length < len(expected.token_ids)
    else:
        assert (found.finish_reason, length) == (expected.finish_reason, len(expected.token_ids))
    assert found.sample_id == expected.sample_id
    assert found.token_ids == expected.token_ids[:length]
    assert found.logprobs == expected.logprobs[:length]
    assert found.version_spans == ((VersionSpan(0, version),) if length else ())
    for layer, states in found.hidden_states.items():
        whole = expected.hidden_states[layer]
        assert_same_bits(states, whole if found.finish_reason != "abort" else whole[: len(states)])


class Informed(Proposer):
    """Guesses what a sample must be, every third token wrongly."""

    def __init__(self, parts, workload):
        super().__init__(parts)
        self.workload = workload

    def propose(self, contexts):
        return [Proposal(self.guesses(*context)) for context in contexts]

    def guesses(self, sample, slot, token_ids, room):
        if (known := self.workload.live.get(sample.request.request_id)) is None:
            return token_ids[-room:].tolist() if room else []  # of a call
        _, expected, _, _ = known
        start = len(token_ids) - sample.prompt_len
        rest = expected[sample.index].token_ids[start:] + (1,) * room  # behind its end too
        return [t if (start + i) % 3 else 0 for i, t in enumerate(rest[:room])]


class Workload(RuleBasedStateMachine):
    """The engine, and what is expected of it."""

    oracle: Oracle
    events: Counter  # how often what was to be tried came about

    @initialize(settings=st.fixed_dictionaries(SETTINGS))
    def start(self, settings):
        steps = settings.pop("steps")
        settings |= {"overlap": True} if "overlap" in steps else {}
        if "guesses" in steps:
            settings |= {"speculative": "suffix", "adaptive_drafts": False}
        self.engine = Engine(self.oracle.folder, **settings)
        if (speculation := self.engine.speculation) is not None:
            speculation.proposer = Informed(speculation.proposer.parts, self)
        self.engine.copy_weights(self.oracle.weights[0], step=0)
        self.which, self.num_updates = 0, 0
        self.live = {}  # by request: prompt, what its samples must be, version
        self.contexts = [STEM[:12]]  # finished samples, to be gone on from
        self.failure = None
        self.original, self.engine.runner.forward = self.engine.runner.forward, self.forward

    def forward(self, batch, collect, rows):
        """The model, within its limits; it fails when it is told to, before or after its work."""
        config, failure = self.engine.config, self.failure
        assert len(batch.input_ids) <= config.max_batch_tokens
        assert self.engine.scheduler.num_running <= config.max_num_seqs
        self.events["forwards"] += 1
        result = None if failure == "before" else self.original(batch, collect, rows)
        if failure is not None:
            self.failure = None
            self.events["failures"] += 1
            raise Fire
        return result

    def take(self, groups):
        """What the engine reports is what was promised."""
        for group in groups:
            prompt, expected, layers, version = self.live.pop(group[0].request_id)
            for found, whole in zip(group, expected, strict=True):
                assert_same(found, whole, version)
                if found.finish_reason != "abort":
                    assert tuple(found.hidden_states) == layers
                    self.contexts.append([*prompt, *found.token_ids])

    def step_once(self):
        with suppress(Fire):
            self.take(self.engine.step())

    def finish(self):
        """Step to the end."""
        for _ in range(2000):
            if not self.live:
                break
            self.step_once()
        assert not self.live, "the engine hangs"

    # -- what comes ------------------------------------------------------------------------------

    @rule(
        prompt=st.sampled_from(PROMPTS),
        params=st.sampled_from(PARAMS),
        first_id=st.sampled_from([0, 2]),
        layers=st.sampled_from([(), (), LAYERS]),
    )
    def add(self, prompt, params, first_id, layers):
        ids = range(first_id, first_id + params.n)
        request = self.engine.add_request(prompt, params, ids, return_hidden_states=layers)
        expected = self.oracle.samples(self.which, prompt, params, ids)
        self.live[request] = (prompt, expected, layers, self.engine.weight_version)

    @rule(place=st.integers(0, 63), token=st.sampled_from([2, 9]), params=st.sampled_from(PARAMS))
    def next_turn(self, place, token, params):
        """A prompt that goes on from an earlier sample: its pages may be known."""
        context = self.contexts[-1 - place % len(self.contexts)]
        self.add([*context[: LONGEST - 1], token], params, 0, ())

    @rule(count=st.sampled_from([1, 2, 5, 12]))
    def step(self, count):
        for _ in range(count):
            self.step_once()

    @rule(place=st.integers(0, 63))
    def abort(self, place):
        if not self.live:
            return
        request = list(self.live)[place % len(self.live)]
        try:
            group = self.engine.abort_request(request)
        except KeyError:  # it has ended, which the next step reports
            self.events["aborts of ended requests"] += 1
            return
        self.events["aborts"] += any(c.finish_reason == "abort" for c in group)
        self.take([group])

    @rule(
        place=st.integers(0, 63),
        temperature=st.sampled_from([1.0, 0.5]),
        prompt=st.sampled_from(PROMPTS),
    )
    def call(self, place, temperature, prompt):
        """score, generate and the next turn at once, while others are unfinished."""
        context = (self.contexts[place % len(self.contexts)] + STEM)[:CAPACITY]
        expected = self.oracle.score(self.which, context, temperature)
        with suppress(Fire):
            assert self.engine.score([context], temperature) == [expected]
        with suppress(Fire):
            page_size = self.engine.config.page_size  # a whole page, but for the last one's keys
            num_new = page_size - len(prompt) % page_size
            last = self.generate(prompt, replace(FREE, n=2, max_new_tokens=num_new))[-1]
            self.generate([*prompt, *last.token_ids, 9], SamplingParams(max_new_tokens=2))
            self.events["next turns"] += page_size > 1 and self.engine.config.prefix_cache

    def generate(self, prompt, params):
        """A request's samples, which are what they must be."""
        [group] = self.engine.generate([prompt], params)
        expected = self.oracle.samples(self.which, prompt, params, range(params.n))
        for found, whole in zip(group, expected, strict=True):
            assert_same(found, whole, self.engine.weight_version)
        return group

    @rule(when=st.sampled_from(["before", "after"]))
    def fail(self, when):
        """The next forward fails."""
        self.failure = when

    @rule()
    def flush(self):
        self.engine.flush_cache()

    @rule()
    def update_refused(self):
        """While anything is unfinished weights stay what they are."""
        self.failure = None
        self.step_once()  # reports whatever has ended
        if self.live:
            self.events["refused updates"] += 1
            before = self.engine.weight_version
            for update in (self.engine.sink.begin, self.engine.bind_weights):
                arguments = [self.oracle.weights[0]] if update == self.engine.bind_weights else []
                with pytest.raises(WeightSyncError, match=f"engine: {len(self.live)} requests"):
                    update(*arguments, 99)
            assert self.engine.weight_version == before

    @rule(
        which=st.sampled_from([0, 1]),
        how=st.sampled_from(["tensor", "bind", "in place", "after a failed one"]),
    )
    def update(self, which, how):
        """New weights for the engine, once all is done."""
        self.finish()
        engine, weights = self.engine, self.oracle.weights[which]
        step = self.num_updates = self.num_updates + 1
        if how == "after a failed one":
            self.events["failed updates"] += 1
            with pytest.raises(WeightSyncError, match="digest"):
                engine.copy_weights(self.oracle.weights[which - 1], step, "00")
            with pytest.raises(WeightSyncError, match="broke off"):
                engine.add_request(PROMPTS[0], FREE)
        if how == "bind":
            engine.bind_weights({n: w.clone() for n, w in weights.items()}, step)
        elif how == "in place":
            engine.sink.begin(step)
            for name, weight in weights.items():
                engine.weights[name].copy_(weight)
            engine.sink.receive_in_place(engine.weights)
            engine.sink.commit(engine.digest())
        else:
            engine.copy_weights(weights, step)
        digest = self.oracle.engines[which].weight_version.digest
        assert engine.weight_version == WeightVersion(step, digest)
        self.which = which
        self.events["updates"] += 1

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def the_books_are_right(self):
        check_books(self.engine)
        assert self.engine.has_unfinished_requests == bool(self.live)

    def teardown(self):
        if not hasattr(self, "live"):
            return
        self.finish()
        engine, self.engine.runner.forward = self.engine, self.original
        settle(engine)
        self.events["preemptions"] += engine.scheduler.num_preemptions
        if engine.accept_lengths is not None:
            self.events["right guesses"] += sum(engine.accept_lengths.right)
        if engine.prefixes is not None:
            self.events["cached tokens"] += engine.prefixes.num_hit_tokens


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    make_random_model(folder, "qwen3", seed=3, tied=False, vocab_size=VOCAB, num_layers=2)
    return Oracle(folder)


def run_programs(oracle, num_programs, number, phases):
    """Run so many programs; returns how often what happened in them."""

    class Seeded(Workload):
        pass

    Seeded.oracle, Seeded.events = oracle, Counter()
    run_state_machine_as_test(
        hypothesis.seed(number)(Seeded),
        settings=hypothesis.settings(
            max_examples=num_programs,
            stateful_step_count=20,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=True,
        ),
    )
    print(Seeded.events)
    return Seeded.events


@pytest.fixture(autouse=True)
def _same_programs(monkeypatch, tmp_path):
    """Constants of the modules that happen to be loaded would make other programs of a seed."""
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)
    monkeypatch.setattr(HypothesisProvider, "_local_constants", Constants())


def test_random_workload(oracle):
    """The same programs every time, in which everything happens that can."""
    events = run_programs(oracle, NUM_PROGRAMS, SEED, [Phase.generate])
    assert set(+events) >= EVENTS


@pytest.mark.long
def test_a_thousand_random_workloads(oracle):
    """Other programs every time."""
    number = int(os.environ.get("SAMEBIT_WORKLOAD_SEED", secrets.randbits(32)))
    print(f"SAMEBIT_WORKLOAD_SEED={number}")  # shown when it fails
    run_programs(oracle, 1000, number, [Phase.generate, Phase.shrink])
