"""How many tokens are guessed: as many as pay, by the rows that graphs have and what was right."""

import numpy as np
import pytest
from helpers import make_prompts

from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.speculative.draft_length import (
    _FIRST_WAIT,
    _LONGEST_WAIT,
    FREE_ROWS,
    DraftLength,
    StepCost,
)

CUDA = StepCost(FREE_ROWS["cuda"], pads=True)


def lens_of(num_samples, guesses):
    """So many samples, of which the first have guesses."""
    return np.array([*guesses, *[0] * (num_samples - len(guesses))])


def played(length, num_samples, num_steps, right):
    """What was asked for in each step, where every sample has all guesses; `right` of them hold."""
    asked = []
    for _ in range(num_steps):
        asked.append(length.choose(num_samples))
        if asked[-1]:
            lens = np.full(num_samples, asked[-1])
            lens = np.minimum(lens, length.cut(lens, {}, 0))
            length.learn(lens, 1 + np.minimum(lens, right))
    return asked


def test_no_more_is_guessed_than_pays():
    """Right guesses: many for one sample, few for many; wrong ones: none."""
    cost = StepCost(64, pads=True, draft=0.05)
    length = DraftLength(5, True, cost)
    played(length, 1, 40, right=5)
    assert [length.choose(n) for n in (1, 8, 64, 600)] == [5, 5, 3, 0]
    assert played(length, 1, 200, right=0)[-60:].count(0) > 57
    assert DraftLength(5, False, cost).choose(999) == 5


def test_one_samples_guesses_do_not_pad_all():
    """64 samples of which one has three guesses: 256 rows for 67. Without graphs it is 67."""
    for pads, most in ((True, 0), (False, 3)):
        length = DraftLength(5, True, StepCost(FREE_ROWS["cuda"], pads))
        length.choose(64)
        assert length.cut(lens_of(64, [3]), {}, 0) == most
    length = DraftLength(5, True, CUDA)
    length.choose(64)
    assert length.cut(lens_of(64, [5, 3, *[1] * 60]), {}, 0) == 1, "only few have more"
    assert length.cut(lens_of(64, [3] * 64), {}, 0) == 3
    assert length.cut(lens_of(64, [4, *[3] * 63]), {}, 0) == 3, "a fourth would double all rows"
    assert length.cut(lens_of(64, [3]), {}, 500) == 3, "beside a chunk there is no graph"
    assert length.cut(lens_of(300, [5] * 300), {}, 0) <= 1, "no graph has more rows"


def test_what_a_proposer_says_of_its_guesses_counts():
    length = DraftLength(5, True, CUDA)
    length.choose(8)
    lens = lens_of(8, [5] * 8)
    assert length.cut(lens, {}, 0) == 5
    unlikely = {i: np.array([0.9, 0.01, 0.01, 0.01, 0.01]) for i in range(8)}
    assert length.cut(lens, unlikely, 0) == 1
    assert length.cut(lens, {i: unlikely[i] for i in range(4)}, 0) == 3, "of four it is not known"
    assert DraftLength(5, False, CUDA).cut(lens, unlikely, 0) == 5


@pytest.mark.parametrize("num_samples", [1, 8, 64, 256])
@pytest.mark.parametrize("empty", [False, True])
def test_useless_rounds_become_rare(num_samples, empty):
    """Nothing is guessed, or nothing right: then it is left, and tried at intervals that double."""
    length, asked = DraftLength(5, True, CUDA), []
    none = np.zeros(num_samples, dtype=np.int64)
    for _ in range(2000):
        asked.append(length.choose(num_samples))
        if asked[-1]:
            lens = none if empty else none + asked[-1]
            length.learn(np.minimum(lens, length.cut(lens, {}, 0)), none + 1)
    rounds = np.flatnonzero(asked)
    begin, gaps = rounds[np.diff(rounds, append=9999) > 1][0], np.diff(rounds)
    assert begin < 60
    waits = [_FIRST_WAIT * 2**i for i in range(20) if _FIRST_WAIT * 2**i < _LONGEST_WAIT]
    assert (gaps[gaps > 1] - 1).tolist()[: len(waits) + 3] == [*waits, *[_LONGEST_WAIT] * 3]
    assert len(rounds) < begin + 25


@pytest.mark.parametrize("num_samples", [4, 64])
def test_what_has_become_predictable_is_noticed(num_samples):
    length = DraftLength(5, True, CUDA)
    assert played(length, 4, 400, right=0)[-60:].count(0) > 58
    asked = played(length, num_samples, _LONGEST_WAIT + 40, right=5)
    assert all(asked[-39:]), "one round that pays, and it goes on"
    asked = played(length, 4, 200, right=0)
    waits = "".join("x" if k else "." for k in asked).strip("x").split("x")
    assert len(waits[0]) == _LONGEST_WAIT // 2, "it is trusted sooner than before"


def test_a_large_batch_is_not_held_against_guesses():
    """Where many samples leave no rows for them nothing is tried, and as soon as few are left it
    is guessed at once."""
    length = DraftLength(5, True, CUDA)
    played(length, 4, 30, right=5)
    assert not any(played(length, 900, 300, right=5)), "two rows of each have no graph"
    assert length.choose(4) == 5


def test_guesses_without_a_graph_are_not_asked_for():
    length = DraftLength(5, True, CUDA)
    assert [length.choose(8, most) for most in (15, 3, 1, 0)] == [5, 3, 1, 0]


SHAPES = {
    "SmolLM2-135M": (576, 30, 9, 3, 64, 1536, 49152, (0.167, 0.240)),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, (0.046, 0.111)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_costs_the_weights_that_it_reads(name):
    """As shares of the target's layers and head; the draft says 32,000 tokens, or all."""
    D, layers, heads, kv_heads, Dh, F, V, shares = SHAPES[name]
    layer = D * (heads + 2 * kv_heads) * Dh + heads * Dh * D + 3 * D * F
    for size, share in zip((32000, V), shares, strict=True):
        draft = DraftConfig(
            hidden_size=D, target_hidden_size=D, captured_layers=(1, 2, 3), num_heads=heads,
            num_kv_heads=kv_heads, head_dim=Dh, ffn_size=F, vocab_size=V, draft_vocab_size=size,
            max_position=2048, norm_eps=1e-5,
        )  # fmt: skip
        found = draft.num_matmul_weights / (layers * layer + V * D)
        assert found == pytest.approx(share, abs=0.001)


def test_the_engines_costs_are_those_of_its_draft(make_engine, engine, tmp_path):
    """A chain costs a pass for each guess, a block draft one for a round."""
    from samebit.recipes.verification.speculation import write_random_draft

    for name, options in (("eagle3", {}), ("peagle", {"mask_token_id": 5})):
        write_random_draft(tmp_path / name, engine.model_config, **options)
        own = make_engine(speculative=name, draft_model=str(tmp_path / name))
        own.generate(make_prompts(3))
        proposer = own.speculation.proposer
        params = own.draft_control.params
        once = ("draft.fc.weight", "draft.output_layer.weight")  # this one is padded
        weights = sum(p.numel() for n, p in params.items() if p.ndim == 2 and n not in once)
        weights += own.model_config.hidden_size * (own.model_config.vocab_size // 2)
        share = weights / own.model_config.num_matmul_weights
        expected = {"eagle3": (share, 0.0), "peagle": (0.0, share)}
        assert (proposer.cost, proposer.round_cost) == expected[name]
