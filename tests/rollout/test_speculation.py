"""Speculation: whatever is guessed, tokens and log-probs are those of an engine without."""

import asyncio
import itertools
import math

import pytest
import torch
from callers import parts_of, put_together
from conservation import check_books
from helpers import assert_same_bits, make_prompts, outcomes
from pauses import add, changed, finish, num_drawn
from safetensors.torch import load_file

from samebit.recipes.models.tiny_model import make_random_model
from samebit.recipes.verification.speculation import recall, write_random_draft
from samebit.rollout.engine import Engine
from samebit.rollout.models.draft.config import OUTPUT
from samebit.rollout.speculative.proposer import Proposal, Proposer, ProposerError
from samebit.rollout.types import SamplingParams

PROMPTS = make_prompts(5, 16, 70, 1, 33)
LIMITS = (
    {"temperature": 0.0},
    {},
    {"temperature": 1.3, "top_p": 0.9, "min_new_tokens": 9},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 0.0, "min_p": 0.05},
)
PARAMS = [SamplingParams(n=2, max_new_tokens=16, **limits) for limits in LIMITS]
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]
STEADY = {"speculative": "suffix", "adaptive_drafts": False}


@pytest.fixture(scope="module")
def truth(engine):
    return engine.generate(PROMPTS, PARAMS, IDS)


@pytest.fixture(scope="module")
def draft_path(engine, tmp_path_factory):
    """A random draft of the random Qwen3. Do not write to it."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    write_random_draft(folder, engine.model_config)
    return str(folder)


@pytest.fixture(scope="module")
def block_path(engine, tmp_path_factory):
    """As draft_path, and a block draft. Do not write to it."""
    folder = tmp_path_factory.mktemp("draft") / "block"
    write_random_draft(folder, engine.model_config, mask_token_id=0)
    return str(folder)


@pytest.fixture
def make_recalling(make_engine, truth):
    """An engine whose guesses are mostly right."""

    def make(completions=None, **settings):
        own = make_engine(**STEADY | settings)
        recall(own, list(itertools.chain(*(completions or truth))))
        return own

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_draft_tokens": 1, "prefix_cache": False},
        {"num_draft_tokens": 15, "page_size": 16},
        {"max_num_seqs": 3, "prefill_chunk": 7, "max_batch_tokens": 20},
        {"page_size": 16, "kv_cache_tokens": 144},
        {"page_size": 1, "num_draft_tokens": 4},
        {"max_num_seqs": 2, "adaptive_drafts": True},
        {"page_size": 16, "kv_cache_tokens": 144, "overlap": True},
    ],
    ids=str,
)
def test_guesses_that_are_mostly_right(make_recalling, truth, settings):
    """Chunks beside them, one sample and many, forks, preemption, then hits of the prefix cache."""
    own = make_recalling(**settings)
    for _ in range(2):
        assert outcomes(own.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    lengths, most = own.accept_lengths, settings.get("num_draft_tokens", 5)
    assert lengths.accept_length > (1.4 if most == 1 else 1.9)
    assert lengths.tokens == lengths.verifications + sum(lengths.right)
    assert all(a >= b for a, b in itertools.pairwise(lengths.right))
    assert len(lengths.acceptance) == most
    if "kv_cache_tokens" in settings:
        assert own.scheduler.num_preemptions > 0
    check_books(own)


def test_a_stop_token_amid_what_was_guessed_right(make_engine, make_recalling, truth):
    """The completion ends with it, whatever was verified behind it; so do those of another reason
    to end in the same step."""
    params = [
        SamplingParams(**vars(p) | {"stop_token_ids": [group[0].token_ids[3 + 2 * i]]})
        for i, (p, group) in enumerate(zip(PARAMS, truth, strict=True))
    ]
    expected = make_engine().generate(PROMPTS, params, IDS)
    assert {c.finish_reason for group in expected for c in group} == {"stop", "length"}
    own = make_recalling(num_draft_tokens=15)
    found = own.generate(PROMPTS, params, IDS)
    assert found == expected
    assert own.loop.book.num_drawn == sum(len(c.token_ids) for group in found for c in group)
    check_books(own)


def test_a_stream_tells_several_tokens_at_once(make_recalling, truth):
    own = make_recalling()
    parts = asyncio.run(parts_of(own.stream(PROMPTS, PARAMS, IDS)))
    for completion in itertools.chain(*truth):
        put_together(parts[completion.sample_id], completion)
    assert max(len(p.token_ids) for told in parts.values() for p in told) > 2
    assert max(map(len, parts.values())) < 16


def test_hidden_states_are_of_tokens_that_were_drawn(make_engine, make_recalling, truth):
    layers = {"return_hidden_states": (0, 2)}
    expected = make_engine().generate(PROMPTS[:3], PARAMS[:3], IDS[:3], **layers)
    found = make_recalling(prefill_chunk=7).generate(PROMPTS[:3], PARAMS[:3], IDS[:3], **layers)
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
        for layer in (0, 2):
            assert_same_bits(a.hidden_states[layer], b.hidden_states[layer])


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_new_weights_amid_a_sample(make_engine, make_recalling, truth, mode):
    """Paused after as many tokens as an engine that guesses none, and changed alike."""
    found, count = [], 0
    for own in (make_recalling(), make_engine()):
        [name] = add(own, PROMPTS[1:2], SamplingParams(max_new_tokens=16), first_id=2)
        while num_drawn(own, name) < (count or 3):
            own.step()
        count = count or num_drawn(own, name)
        assert num_drawn(own, name) == count
        own.pause_generation(mode)
        own.copy_weights(changed(own), step=1)
        own.continue_generation()
        [group] = finish(own, [name])
        assert [span.start for span in group[0].version_spans] == [0, count]
        found.append([[group[0]]])
    assert outcomes(found[0]) == outcomes(found[1])


DRAFTED = [
    {"speculative": "eagle3"},
    {"speculative": "eagle3", "page_size": 16, "kv_cache_tokens": 192, "num_draft_tokens": 7},
    {"speculative": "eagle3", "overlap": True},
    {"speculative": "hybrid", "page_size": 1, "prefill_chunk": 17, "num_draft_tokens": 2},
]
BLOCKS = [
    {"speculative": "peagle", "page_size": 16, "kv_cache_tokens": 192, "num_draft_tokens": 7},
    {"speculative": "hybrid", "max_num_seqs": 3, "overlap": True},
]


@pytest.mark.parametrize(
    ("settings", "weights"), [*((s, "random") for s in DRAFTED), (DRAFTED[0], "nan")], ids=str
)
def test_a_draft_that_knows_nothing(make_engine, truth, draft_path, settings, weights):
    own = make_engine(**{"adaptive_drafts": False, "draft_model": draft_path} | settings)
    if weights == "nan":
        for param in own.draft_control.params.values():
            param.fill_(math.nan)
    found = own.generate(PROMPTS, PARAMS, IDS)
    assert outcomes(found) == outcomes(truth)
    assert own.accept_lengths.verifications > 0
    check_books(own)


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
def test_a_block_draft_that_knows_nothing(make_engine, truth, block_path, settings):
    own = make_engine(**settings, adaptive_drafts=False, draft_model=block_path)
    assert outcomes(own.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    assert own.accept_lengths.guessed[-1] > 0
    check_books(own)


def test_a_draft_of_the_other_kind(make_engine, draft_path, block_path):
    with pytest.raises(ValueError, match="a block draft; engine.speculative must be peagle or hy"):
        make_engine(speculative="eagle3", draft_model=block_path)
    with pytest.raises(ValueError, match="no block draft; engine.speculative must be eagle3 or h"):
        make_engine(speculative="peagle", draft_model=draft_path)


def test_a_drafts_weights_come_back(make_engine, truth, draft_path):
    """Without a backup of the engine's, which a full update brings: a draft has none."""
    own = make_engine(speculative="eagle3", draft_model=draft_path)
    params, weights = own.draft_control.params, {n: w.clone() for n, w in own.weights.items()}
    kept = {name: param.clone() for name, param in params.items()}
    assert own.release_memory_occupation(["weights", "draft"])["draft"] > 0
    with pytest.raises(RuntimeError, match="draft"):
        own.generate(PROMPTS, PARAMS, IDS)
    own.resume_memory_occupation()
    own.copy_weights(weights, step=1)
    for name, param in params.items():
        assert_same_bits(param, kept[name], name)
    assert outcomes(own.generate(PROMPTS[:1], PARAMS[:1], IDS[:1])) == outcomes(truth[:1])


def test_a_draft_is_released_and_resumed(make_engine, draft_path):
    """In the midst of samples, all tags."""
    settings = {"speculative": "eagle3", "adaptive_drafts": False, "draft_model": draft_path}
    own = make_engine(**settings, weights_backup=True)
    names = add(own, PROMPTS, SamplingParams(n=2, max_new_tokens=12))
    for _ in range(3):
        own.step()
    own.pause_generation("keep")
    assert own.release_memory_occupation()["draft"] > 0
    own.resume_memory_occupation()
    own.continue_generation()
    found = finish(own, names)
    plain = make_engine()
    assert outcomes(found) == outcomes(
        finish(plain, add(plain, PROMPTS, SamplingParams(n=2, max_new_tokens=12)))
    )
    assert own.accept_lengths.verifications > 0


class TooMany(Proposer):
    def propose(self, contexts):
        return [Proposal([0] * (context.room + 1)) for context in contexts]


class Foreign(Proposer):
    def propose(self, contexts):
        return [Proposal([0, 331][: context.room]) for context in contexts]


class NoToken(Proposer):
    def propose(self, contexts):
        return [Proposal(["a", 2**64][: context.room]) for context in contexts]


class Short(Proposer):
    def propose(self, contexts):
        return []


class Broken(Proposer):
    def propose(self, contexts):
        raise KeyError("lost")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TooMany", "TooMany proposed 6 tokens where there is room for 5"),
        ("Foreign", r"Foreign proposed \[0, 331\]; the vocabulary has 331 tokens"),
        ("NoToken", "NoToken proposed what is no token: invalid literal"),
        ("Short", "Short gave 0 proposals for 1 contexts"),
        ("Broken", r"Broken failed: KeyError\('lost'\)"),
    ],
)
def test_a_proposer_from_outside_that_is_wrong(make_engine, name, message):
    """Its own error, which names it; the engine is as it was."""
    own = make_engine(speculative=f"{__name__}:{name}")
    for _ in range(2):
        with pytest.raises(ProposerError, match=f"the proposer {__name__}:{message}"):
            own.generate([[1, 2, 3]], SamplingParams(max_new_tokens=9))
    check_books(own)


class WithDraft(Proposer):
    """Guesses one token always, by the draft's output layer."""

    takes_draft = True

    def propose(self, contexts):
        vocabulary = self.parts.draft.vocabulary.token_ids
        table = self.parts.draft.params[OUTPUT][: len(vocabulary)]
        token_id = int(vocabulary[(table @ table[0]).argmax()])
        return [Proposal([token_id][: context.room]) for context in contexts]


def test_a_proposer_from_outside_with_a_draft(make_engine, truth, draft_path):
    """It is given the engine's; none is refused, as is one for a class that takes none."""
    own = make_engine(speculative=f"{__name__}:WithDraft", draft_model=draft_path)
    assert outcomes(own.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    assert own.accept_lengths.verifications > 0
    with pytest.raises(ValueError, match="draft_model is None; it must be the path of a draft"):
        make_engine(speculative=f"{__name__}:WithDraft")
    with pytest.raises(ValueError, match="must be unset with .*:Broken, whose class does not say"):
        make_engine(speculative=f"{__name__}:Broken", draft_model=draft_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative": "ngram"}, "engine.speculative is 'ngram'; it must be one of .*'suffix'"),
        ({"speculative": "nowhere:Kind"}, "engine.speculative is 'nowhere:Kind', which cannot be"),
        (
            {"speculative": "json:JSONDecoder"},
            "engine.speculative .* a subclass of .*Proposer",
        ),
        ({"num_draft_tokens": 16}, r"engine.num_draft_tokens is 16; it must be in \[1, 15\]"),
        ({"num_draft_tokens": 3}, "engine.num_draft_tokens is 3; .* 5, its default, with specul"),
        ({"adaptive_drafts": False}, "engine.adaptive_drafts is False; .* True, its default, wit"),
        ({"num_draft_tokens": 0}, r"engine.num_draft_tokens is 0; it must be in \[1, 15\]"),
        ({"speculative": "eagle3"}, "engine.draft_model is None; it must be the path of a draft"),
        ({"draft_model": "x"}, "engine.draft_model is 'x'; it must be unset with speculative=none"),
        (
            {"speculative": "suffix", "draft_norm_output": "sglang"},
            "engine.draft_norm_output is 'sglang'; it must be sglang or specforge, or unset",
        ),
    ],
)
def test_settings_that_do_not_fit(make_engine, settings, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**settings)


def test_a_draft_for_another_target(make_engine, draft_path, tmp_path):
    make_random_model(tmp_path / "other", "qwen3", seed=0, tied=True, vocab_size=29)
    message = "draft_model is .*, a draft for a target with vocab_size 331; this engine's .* has 29"
    with pytest.raises(ValueError, match=message):
        Engine(tmp_path / "other", speculative="eagle3", draft_model=draft_path)
    with pytest.raises(FileNotFoundError, match="draft folder nowhere has no config.json"):
        make_engine(speculative="eagle3", draft_model="nowhere")


def test_pickled_weights_are_refused_with_a_way_that_works(make_engine, engine, tmp_path):
    """As EAGLE's own folders hold them: the message's lines make safetensors of the same bytes."""
    folder = tmp_path / "draft"
    write_random_draft(folder, engine.model_config)
    own = make_engine(speculative="eagle3", draft_model=str(folder))
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds pytorch_model.bin, which is not") as error:
        make_engine(speculative="eagle3", draft_model=str(folder))
    exec(str(error.value).split("Python:\n")[1], {})
    again = make_engine(speculative="eagle3", draft_model=str(folder))
    assert again.draft_version == own.draft_version
