"""Pauses between two steps: what is unfinished goes on to the same bits, under whatever weights."""

from dataclasses import replace

import pytest
import torch
from conservation import check_books, settle
from helpers import outcomes
from pauses import (
    PARAMS,
    PROMPTS,
    add,
    changed,
    finish,
    finish_without_settling,
    num_drawn,
    step_until,
)

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import VersionSpan

TIGHT = {"kv_cache_tokens": 44, "page_size": 4}
SETTINGS = [
    {},
    {"page_size": 4, "prefill_chunk": 3, "max_batch_tokens": 9},
    {"max_num_seqs": 2, "prefix_cache": False},
    {"overlap": True},
    TIGHT,
    TIGHT | {"overlap": True, "page_size": 2},
]
LAYERS = (0, 2)


def bits(groups):
    return [
        [
            (*o, {n: h.tolist() for n, h in c.hidden_states.items()})
            for o, c in zip(*pair, strict=True)
        ]
        for pair in zip(outcomes(groups), groups, strict=True)
    ]


@pytest.fixture(scope="module")
def truth(small_folder):
    engine = Engine(small_folder)
    return bits(finish(engine, add(engine, layers=LAYERS)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["retract", "keep", "in_place"])
@pytest.mark.parametrize("weights", ["no update", "the same weights"])
def test_a_pause_moves_no_bit(small_folder, truth, settings, mode, weights):
    """At several moments, without an update or with one that changes nothing."""
    engine = Engine(small_folder, **settings)
    names, found, step = add(engine, layers=LAYERS), {}, 0
    same = {n: w.clone() for n, w in engine.weights.items()}
    while engine.has_unfinished_requests:
        found |= {group[0].request_id: group for group in engine.step()}
        step += 1
        if step not in (2, 3, 7, 14):
            continue
        engine.pause_generation(mode)
        assert engine.is_paused
        if weights == "the same weights":
            engine.copy_weights(same, step)
        check_books(engine)
        engine.continue_generation()
        assert not engine.is_paused
    settle(engine)
    groups = [found[name] for name in names]
    assert bits(groups) == truth
    spans = [span for group in groups for c in group for span in c.version_spans]
    if weights == "no update":
        assert {(span.start, span.version.step) for span in spans} == {(0, 0)}
    else:
        assert {span.recomputed for span in spans} == {False} | ({True} & {mode == "retract"})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_retract_goes_on_as_a_fresh_engine_from_what_was_drawn(small_folder, settings):
    """Context and weights are all that counts, so a prompt of what was drawn draws the rest."""
    engine = Engine(small_folder, **settings)
    before, names = engine.weight_version, add(engine)
    new, fresh = changed(engine), Engine(small_folder)
    step_until(engine, names[0], 4)
    engine.pause_generation("retract")
    version = engine.copy_weights(new, 7)
    engine.continue_generation()
    fresh.copy_weights(new, 7)
    for prompt, group in zip(PROMPTS, finish(engine, names), strict=True):
        for found in group:
            first, *others = found.version_spans
            start = others[0].start if others else 0
            assert first == VersionSpan(0, before if others else version)
            assert others in ([], [VersionSpan(start, version, recomputed=True)])
            rest = replace(PARAMS, n=1, max_new_tokens=12 - start)
            context = [*prompt, *found.token_ids[:start]]
            [[again]] = fresh.generate([context], rest, [[found.sample_id]])
            assert again.token_ids == found.token_ids[start:]
            assert again.logprobs == found.logprobs[start:]


def kept(small_folder, settings, companions, watch=lambda engine: None):
    """The samples of two prompts, updated to new weights once the first has drawn four tokens."""
    found = []
    for prompt in PROMPTS[:2]:
        engine = Engine(small_folder, **settings)
        watch(engine)
        add(engine, companions[:1], replace(PARAMS, max_new_tokens=7), first_id=500)
        [name] = add(engine, [prompt], replace(PARAMS, n=1, max_new_tokens=16))
        add(engine, companions[1:], replace(PARAMS, max_new_tokens=15), first_id=600)
        step_until(engine, name, 4 - engine.step_loop.depth)
        engine.pause_generation("keep")
        assert num_drawn(engine, name) == 4
        engine.copy_weights(changed(engine), 7)
        engine.continue_generation()
        found += finish(engine, [name])[0]
    return found


@pytest.fixture(scope="module")
def kept_alone(small_folder):
    return kept(small_folder, {"prefix_cache": False}, [])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("companions", [[], PROMPTS], ids=len)
def test_keep_is_a_function_of_the_spans(small_folder, kept_alone, settings, companions):
    """In any company, with pages of any size, some of which leave for host memory and return."""
    swaps = []

    def watch(engine):
        original = engine.scheduler._swap_out
        engine.scheduler._swap_out = lambda seq: (swaps.append(seq), original(seq))

    found = kept(small_folder, settings, companions, watch)
    assert outcomes([found]) == outcomes([kept_alone])
    for one, other in zip(found, kept_alone, strict=True):
        assert one.version_spans == other.version_spans
        assert [(s.start, s.version.step, s.recomputed) for s in one.version_spans] == [
            (0, 0, False), (4, 7, False)
        ]  # fmt: skip
    assert swaps or settings is not TIGHT or not companions


def test_a_prompt_finds_nothing_of_a_mixed_sample(small_folder):
    """Its pages hold keys and values of weights that are served no more."""
    engine = Engine(small_folder, page_size=2)
    [name] = add(engine, PROMPTS[:1])
    step_until(engine, name, 4)
    engine.pause_generation("keep")
    new = changed(engine)
    engine.copy_weights(new, 7)
    engine.flush_cache()
    engine.continue_generation()
    [[mixed, _]] = finish_without_settling(engine, [name])
    fresh = Engine(small_folder, prefix_cache=False)
    fresh.copy_weights(new, 7)
    context = [[*PROMPTS[0], *mixed.token_ids, 3]]
    assert outcomes(engine.generate(context, PARAMS)) == outcomes(fresh.generate(context, PARAMS))


def test_who_has_drawn_nothing_begins_again(small_folder):
    """A prompt of which a chunk is computed by the old weights is the new version's alone."""
    engine, fresh = Engine(small_folder, prefill_chunk=3), Engine(small_folder)
    names, new = add(engine, PROMPTS[:2]), changed(engine)
    assert not engine.step()
    assert engine.scheduler._prefilling
    for step in (6, 7):  # paused twice, which is one pause
        engine.pause_generation("keep")
        engine.copy_weights(new, step)
    engine.continue_generation()
    fresh.copy_weights(new, 7)
    groups = finish(engine, names)
    assert outcomes(groups) == outcomes(finish(fresh, add(fresh, PROMPTS[:2])))
    assert {s for g in groups for c in g for s in c.version_spans} == {
        VersionSpan(0, fresh.weight_version)
    }


def test_a_second_pause_does_not_forget_the_first(small_folder):
    """What was drawn before either of them is of the version that was served then."""
    engine = Engine(small_folder, page_size=2)
    [name] = add(engine, PROMPTS[:1])
    step_until(engine, name, 4)
    engine.pause_generation("keep")
    engine.copy_weights(changed(engine), 7)
    engine.pause_generation("keep")
    engine.continue_generation()
    engine.step()
    assert all(sample.is_mixed for sample in engine.loop.book.live[name].samples)
    finish(engine, [name])


def test_a_mixed_sample_that_is_retracted_says_so(small_folder):
    """From then on it is the new version's alone, as a fresh engine draws it."""
    engine = Engine(small_folder)
    new, fresh = changed(engine), Engine(small_folder)
    fresh.copy_weights(new, 7)
    [name] = add(engine, PROMPTS[:1])
    for count, mode in ((3, "keep"), (6, "retract")):
        step_until(engine, name, count)
        engine.pause_generation(mode)
        if mode == "keep":
            engine.copy_weights(new, 7)
        engine.continue_generation()
    [[found, _]] = finish(engine, [name])
    assert [(s.start, s.version.step, s.recomputed) for s in found.version_spans] == [
        (0, 0, False), (3, 7, False), (6, 7, True)
    ]  # fmt: skip
    rest = replace(PARAMS, n=1, max_new_tokens=6)
    [[again]] = fresh.generate([[*PROMPTS[0], *found.token_ids[:6]]], rest, [[0]])
    assert again.logprobs == found.logprobs[6:]


def test_who_waits_with_tokens_is_computed_anew_by_the_new_version(small_folder):
    """Preempted before the update: nothing of the old keys is left, and the span says it."""
    engine = Engine(small_folder, **TIGHT)
    names = add(engine)
    while not any(s.token_ids[s.prompt_len :] for s in engine.scheduler._waiting):
        engine.step()
    waiting = {(s.request.request_id, s.index) for s in engine.scheduler._waiting if s.spans}
    engine.pause_generation("keep")
    engine.copy_weights(changed(engine), 7)
    engine.continue_generation()
    for name, group in zip(names, finish(engine, names), strict=True):
        for index, found in enumerate(group):
            later = [span.recomputed for span in found.version_spans[1:]]
            assert later in ([], [(name, index) in waiting])
    assert waiting


def test_the_newest_keys_are_the_new_weights(small_folder):
    """Against a hand-made computation: old pages up to the last token but one, then new weights."""
    engine, donor = Engine(small_folder, page_size=1), Engine(small_folder, page_size=1)
    new, greedy = (
        changed(engine),
        SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True),
    )
    names = [add(one, PROMPTS[:1], greedy)[0] for one in (engine, donor)]
    for one, name in zip((engine, donor), names, strict=True):
        step_until(one, name, 4)
    engine.pause_generation("keep")
    engine.copy_weights(new, 7)
    engine.continue_generation()
    [[found]] = finish(engine, names[:1])
    # The donor's pages, put by hand under a sample of an engine that has the new weights alone.
    sample = donor.loop.book.live[names[1]].samples[0]
    num_computed = len(PROMPTS[0]) + 4 - 1
    pages = donor.runner.cache.read_pages(sample.pages[:num_computed])
    donor.abort_request(names[1])
    fresh = Engine(small_folder, page_size=1)
    fresh.copy_weights(new, 7)
    rest = replace(greedy, max_new_tokens=5)
    [name] = add(fresh, [[*PROMPTS[0], *found.token_ids[:4]]], rest)
    fresh.loop.book.live[name].samples[0].num_computed = num_computed
    fresh.loop.book.live[name].samples[0].swapped = pages
    [[again]] = finish_without_settling(fresh, [name])
    assert again.token_ids == found.token_ids[4:]
    assert again.logprobs == found.logprobs[4:]
    recomputed = Engine(small_folder)
    recomputed.copy_weights(new, 7)
    [[other]] = recomputed.generate([[*PROMPTS[0], *found.token_ids[:4]]], rest)
    assert other.logprobs != again.logprobs
    assert not torch.equal(donor.weights["output_layer.weight"], new["output_layer.weight"])
