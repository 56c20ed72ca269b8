"""Every property of `samebit verify` holds on two small models, and a broken engine is noticed."""

import functools
from dataclasses import replace

import pytest
import torch

from samebit.kernels import linear as linear_module
from samebit.kernels import sample as sample_module
from samebit.kernels.cpu import sample as cpu_sample
from samebit.recipes.models.tiny_model import make_random_model
from samebit.recipes.verification.properties import (
    PROPERTIES,
    batch_position,
    batch_size,
    prefill_chunk,
    prefix_cache,
    score,
    trainer,
)
from samebit.recipes.verification.subject import PROMPT_LENS, Result, make_subject

CPU = torch.device("cpu")
NUM_NEW = 16
"""Tokens of a sample: contexts still grow across the edges of tiles and pages."""
MODELS = "qwen3-untied", "llama-tied"
OF_ENDS = "decode_batch", "preemption", "group", "neighbour_abort", "score", "trainer", "pauses"
"""What samples that end by themselves, as llama's do, may touch."""
CASES = [
    pytest.param(
        model,
        check,
        id=f"{model}-{check.__name__}",
        marks=() if model == MODELS[0] or check.__name__ in OF_ENDS else pytest.mark.long,
    )
    for model in MODELS
    for check in PROPERTIES
]


@pytest.fixture(scope="module")
def subject_of(qwen3_path, tmp_path_factory):
    """subject_of(name): a model, prompts of every boundary length, and what a plain engine made of
    them."""
    llama_path = tmp_path_factory.mktemp("models") / "llama"

    @functools.cache
    def make(model):
        if model == "qwen3-untied":
            return make_subject(qwen3_path, CPU, num_new_tokens=NUM_NEW)
        make_random_model(llama_path, "llama", seed=10, tied=True)
        return make_subject(llama_path, CPU, num_new_tokens=NUM_NEW)

    return make


@pytest.fixture(params=MODELS)
def subject(request, subject_of):
    return subject_of(request.param)


@pytest.mark.parametrize(("subject", "check"), CASES, indirect=["subject"])
def test_property(subject, check):
    """Not one token or log-prob may differ."""
    result = check(subject)
    assert result.mismatches == 0, result.notes
    assert result.tokens > 0
    assert result.cases > 0


def drawn(subject):
    """Every completion with its prompt."""
    return [(p, c) for p, g in zip(subject.prompts, subject.baseline, strict=True) for c in g]


def test_the_subject_reaches_every_boundary(subject):
    """Tiles of 16 and 64 tokens, from both sides, in prompts and in completions."""
    for boundary in (16, 64, 128):
        assert {boundary - 1, boundary, boundary + 1} <= set(PROMPT_LENS)
    lens = [(len(p), len(p) + len(c.token_ids)) for p, c in drawn(subject)]
    for boundary in (16, 32, 64, 128):
        assert any(first < boundary < last for first, last in lens)
    reasons = {c.finish_reason for group in subject.baseline for c in group}
    assert reasons == {"stop", "length"}
    kinds = {(p.temperature, p.top_k, p.top_p, p.min_p) for p in subject.params}
    assert len(kinds) >= 6


# -- the suite can fail -------------------------------------------------------------------------


def test_one_altered_logprob_is_one_mismatch(subject):
    truth = subject.truth()
    nudged = torch.tensor(truth[3].logprobs)
    nudged[2] = nudged[2].nextafter(torch.tensor(0.0))
    altered = list(truth)
    altered[3] = replace(truth[3], logprobs=tuple(nudged.tolist()))
    result = Result("altered")
    result.compare(altered, truth, "one bit")
    assert (result.cases, result.mismatches) == (1, 1)
    assert result.tokens == sum(len(c.token_ids) for c in truth)
    assert result.notes == [f"one bit: 1 of {len(truth[3].token_ids)}"]


def test_altered_and_missing_tokens_are_mismatches():
    result = Result("altered")
    result.compare_values([1, 2, 3], [1, 5, 3], "a token")
    result.compare_values([1, 2], [1, 2, 3, 4], "two missing")
    result.compare_values([1, 2, 3], [1, 2], "one too many")
    assert result.mismatches == 1 + 2 + 1
    assert result.tokens == 3 + 4 + 3


def broken_subject(path):
    """Measured under the same broken operation, so that only its variance can be noticed."""
    subject = make_subject(path, CPU, num_new_tokens=8)
    for values in (subject.prompts, subject.params, subject.sample_ids, subject.baseline):
        del values[8:]
    return subject


def test_a_plain_matmul_is_found_out(qwen3_path, monkeypatch):
    """A product without padded rows depends on how many rows there are."""

    def plain(x, weight, *_):
        return torch.mm(x, weight.t())

    monkeypatch.setitem(linear_module._forward.implementations, "cpu", plain)
    subject = broken_subject(qwen3_path)
    found = {check.__name__: check(subject).mismatches for check in (batch_size, prefill_chunk)}
    assert found["batch_size"] > 0
    assert found["prefill_chunk"] > 0


def test_noise_by_place_in_the_batch_is_found_out(qwen3_path, monkeypatch):
    """A generator that is shared by the batch draws other tokens in another order."""
    original = cpu_sample.gumbel_noise

    def by_row(seeds, positions, sample_ids, vocab_size):
        return original(seeds, positions, torch.arange(len(seeds)), vocab_size)

    monkeypatch.setitem(sample_module.gumbel_noise.implementations, "cpu", by_row)
    result = batch_position(broken_subject(qwen3_path))
    assert result.mismatches > result.tokens // 2


def test_a_logprob_of_another_temperature_is_found_out(subject, monkeypatch):
    """`score` that forgot the temperature disagrees on exactly the prompts that have one."""
    warm = [i for i, p in enumerate(subject.params) if p.temperature not in (0.0, 1.0)]
    original = type(subject.engine).score

    def forgetful(engine, token_ids, temperature=1.0):
        return original(engine, token_ids)

    monkeypatch.setattr(type(subject.engine), "score", forgetful)
    result = score(subject)
    tokens = sum(len(c.token_ids) for i in warm for c in subject.baseline[i])
    assert result.mismatches > tokens  # twice as many positions, nearly all unequal
    assert result.mismatches <= 2 * tokens


def test_one_bit_of_one_weight_in_the_trainer_is_found_out(subject):
    """The last bit of one element of the final norm, in a copy that only the trainer takes."""
    engine = subject.engine
    session = engine.weight_control.session
    nudged = {name: p.clone() for name, p in engine.weights.items()}
    norm = nudged["decoder.final_layernorm.weight"]
    norm[5] = norm[5].nextafter(torch.tensor(2.0))
    original, session.params = session.params, nudged
    try:
        assert trainer(subject).mismatches > 0
    finally:
        session.params = original


def test_stale_keys_are_found_out(subject, monkeypatch):
    """A prefix cache that hands out the wrong page."""
    make = subject.make_engine

    def make_confused(**settings):
        engine = make(**settings)
        match = engine.prefixes.match

        def first_page_for_all(token_ids):
            pages = match(token_ids)
            for page in pages[1:]:
                engine.pool.drop(page)
                engine.pool.share(pages[0])
            return pages[:1] * len(pages)

        monkeypatch.setattr(engine.prefixes, "match", first_page_for_all)
        return engine

    monkeypatch.setattr(subject, "make_engine", make_confused)
    assert prefix_cache(subject).mismatches > 0
