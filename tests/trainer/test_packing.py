"""Samples to micro-batches: within the budget, in order, every token and weight in its place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from samebit.rollout.models.registry import load_model_config
from samebit.trainer.config import TrainerConfig
from samebit.trainer.loss_means import LOSS_MEANS
from samebit.trainer.packing import pack_samples, segments_of, share_batches, units_of
from samebit.trainer.types import Sample
from samebit.weight_sync.types import VersionSpan, WeightVersion


def sample(sample_id, prompt_len, response_len, **fields):
    ids = tuple(sample_id * 100 + i for i in range(prompt_len + response_len))
    return Sample.of_response(sample_id=sample_id, token_ids=ids, prompt_len=prompt_len, **fields)


SAMPLES = [
    sample(1, 2, 3, logprobs=(-0.5, -0.25, -0.125), advantage=1.5),
    sample(2, 1, 1, logprobs=(-1.0,), advantage=-0.5),
    sample(3, 4, 2, logprobs=(-2.0, -3.0), advantage=0.0),
    sample(4, 1, 7, logprobs=(-0.1,) * 7, advantage=0.3),
]


@pytest.mark.parametrize("max_tokens", [8, 9, 12, 13, 20, 21, 1000])
def test_budget_and_order_hold(max_tokens):
    """A batch over the budget runs out of memory; a reordered one pairs rewards with wrong text."""
    batches = pack_samples(SAMPLES, max_tokens)
    assert [s for b in batches for s in b.samples] == SAMPLES
    assert [b.index for b in batches] == list(range(len(batches)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert batch.num_tokens == sum(batch.seq_lens) <= max_tokens
        if following is not None:
            assert batch.num_tokens + following.seq_lens[0] > max_tokens, "closed too early"


def test_every_field_of_a_packed_batch():
    """Written out by hand: rows predict the next token, starting at the last of the prompt."""
    [batch] = pack_samples(SAMPLES[:3], 100, temperature=0.5)
    assert batch.input_ids.tolist() == [
        *(100, 101, 102, 103, 104),
        *(200, 201),
        *(300, 301, 302, 303, 304, 305),
    ]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]
    assert batch.seq_lens == (5, 2, 6)
    assert batch.rows.tolist() == [1, 2, 3, 5, 10, 11]
    assert batch.target_ids.tolist() == [102, 103, 104, 201, 304, 305]
    assert batch.input_ids[batch.rows + 1].tolist() == batch.target_ids.tolist()
    assert batch.sample_of_row.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.rollout_logprobs.tolist() == [-0.5, -0.25, -0.125, -1.0, -2.0, -3.0]
    assert batch.rollout_logprobs.dtype is batch.advantages.dtype is torch.float32
    assert batch.advantages.tolist() == [1.5, 1.5, 1.5, -0.5, 0.0, 0.0]
    assert batch.temperature == 0.5


def test_loss_means():
    """Summed weights over the summed denominators: 1 either way, for any split into batches."""
    third = torch.tensor(1.0) / 3
    for max_tokens in (1000, 8):
        by_token = pack_samples(SAMPLES, max_tokens, "token")
        assert all(b.loss_weights.eq(1).all() for b in by_token)
        assert sum(b.loss_denominator for b in by_token) == 3 + 1 + 2 + 7
        by_sequence = pack_samples(SAMPLES, max_tokens, "sequence")
        weights = torch.cat([b.loss_weights for b in by_sequence])
        expected = [third] * 3 + [1.0] + [0.5] * 2 + [torch.tensor(1.0) / 7] * 7
        assert weights.tolist() == [float(w) for w in expected]
        assert sum(b.loss_denominator for b in by_sequence) == len(SAMPLES)


def test_the_mean_by_a_constant():
    """Every token counts an eighth, over the number of samples: Dr. GRPO's."""
    for max_tokens in (1000, 8):
        batches = pack_samples(SAMPLES, max_tokens, "constant", loss_mean_tokens=8)
        assert torch.cat([b.loss_weights for b in batches]).tolist() == [0.125] * 13
        assert sum(b.loss_denominator for b in batches) == len(SAMPLES)


def by_half(row_counts, sample_of_row, tokens):
    """Every token counts a half, over the number of samples."""
    return np.full(len(sample_of_row), 0.5, np.float32), len(row_counts)


def test_another_mean_is_a_function_and_its_name(monkeypatch):
    monkeypatch.setitem(LOSS_MEANS, "half", by_half)
    TrainerConfig(loss_mean="half")
    batches = pack_samples(SAMPLES, 8, "half")
    assert torch.cat([b.loss_weights for b in batches]).tolist() == [0.5] * 13
    assert sum(b.loss_denominator for b in batches) == len(SAMPLES)


def test_tokens_in_the_middle_may_be_masked():
    """Two turns with a tool's output between them, behind another sample: by hand."""
    talk = Sample(
        sample_id=5,
        token_ids=range(500, 509),
        loss_mask=[0, 0, 1, 1, 0, 0, 1, 1, 0],
        logprobs=[9, 9, -0.5, -0.25, 9, 9, -0.125, -1, 9],
        advantages=[7, 7, 1, 2, 7, 7, 3, 4, 7],
    )
    assert talk.num_trained == 4
    [batch] = pack_samples([SAMPLES[1], talk], 100, "sequence")
    assert batch.input_ids.tolist() == [200, 201, *range(500, 509)]
    assert batch.positions.tolist() == [0, 1, *range(9)]
    assert batch.rows.tolist() == [0, 3, 4, 7, 8]
    assert batch.target_ids.tolist() == [201, 502, 503, 506, 507]
    assert batch.sample_of_row.tolist() == [0, 1, 1, 1, 1]
    assert batch.row_counts.tolist() == [1, 4]
    assert batch.rollout_logprobs.tolist() == [-1.0, -0.5, -0.25, -0.125, -1.0]
    assert batch.advantages.tolist() == [-0.5, 1.0, 2.0, 3.0, 4.0]
    assert batch.loss_weights.tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]
    assert batch.is_compared.tolist() == [True] * 5


def renewed(span):
    """The span of a version that has computed the context anew."""
    return replace(span, recomputed=True)


def test_a_sample_of_two_versions_is_not_compared():
    """No one set of weights has its log-probs, unless the newest has computed what stands before
    its tokens; it is trained on like the others."""
    versions = [WeightVersion(step, f"{step:016x}") for step in (1, 2)]
    spans = [VersionSpan(3 * i, version) for i, version in enumerate(versions)]
    mixed = sample(7, 2, 5, logprobs=(-1.0,) * 5, version_spans=spans)
    drawn = sample(8, 1, 2, logprobs=(-1.0,) * 2, version_spans=spans[:1])
    assert mixed.version_spans[1].start == 5
    [batch] = pack_samples([mixed, drawn, SAMPLES[1]], 100)
    assert batch.is_compared.tolist() == [False] * 5 + [True] * 3
    anew = sample(9, 2, 5, logprobs=(-1.0,) * 5, version_spans=spans[:1] + [renewed(spans[1])])
    [batch] = pack_samples([drawn, anew], 100)
    assert batch.is_compared.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    [taught] = pack_samples([sample(1, 2, 2)], 100)
    assert taught.is_compared.tolist() == [False, False]


def test_units_are_never_parted():
    """A loss of pairs sees both; where one is too long for a micro-batch, that is said."""
    pairs = [replace(sample(i, 1, n), unit=i // 2) for i, n in enumerate((2, 3, 4, 1, 1, 5))]
    for max_tokens, at_least, expected in (
        (100, 1, [[0, 1, 2, 3, 4, 5]]),
        (15, 1, [[0, 1, 2, 3], [4, 5]]),
        (8, 1, [[0, 1], [2, 3], [4, 5]]),
        (100, 2, [[0, 1], [2, 3, 4, 5]]),
        (100, 9, [[0, 1], [2, 3], [4, 5]]),
    ):
        batches = pack_samples(pairs, max_tokens, at_least=at_least)
        assert [[s.sample_id for s in b.samples] for b in batches] == expected
    alike = [replace(s, unit=0) for s in pairs[:2]]
    assert len(pack_samples([*alike, SAMPLES[0], SAMPLES[1], *alike], 8)) == 3
    message = "sample 0 with the 1 others of its unit has 7 tokens; .*micro_batch_tokens is 6"
    with pytest.raises(ValueError, match=message):
        pack_samples(pairs, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mask": [0, 0, 0]}, "sample 7: loss_mask must be set for some of 3 tokens"),
        ({"loss_mask": [1, 0, 1]}, "sample 7: loss_mask must be set .* not for the first"),
        ({"loss_mask": [0, 1]}, r"sample 7: loss_mask of shape \(2,\) for 3 tokens"),
        ({"loss_mask": [0.0, 0.5, 1.0]}, "sample 7: loss_mask must hold 0 or 1"),
        ({"token_ids": [1, 2.5, 3]}, "sample 7: token_ids must hold integers"),
        ({"logprobs": [-1.0] * 4}, r"sample 7: logprobs of shape \(4,\) for 3 tokens"),
        ({"advantages": [[1.0] * 3]}, r"sample 7: advantages of shape \(1, 3\) for 3 tokens"),
    ],
)
def test_a_sample_that_does_not_fit_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sample(**({"sample_id": 7, "token_ids": (1, 2, 3), "loss_mask": (0, 1, 1)} | fields))


def test_samples_of_both_kinds_do_not_mix():
    """Drawn ones beside supervised ones: what would be compared with what?"""
    drawn, taught = sample(1, 1, 2, logprobs=(-0.5, -0.25)), sample(2, 1, 2)
    for samples in ([drawn, taught], [taught, drawn]):
        with pytest.raises(ValueError, match="have rollout logprobs and some have none"):
            pack_samples(samples, 100)


def test_rollout_logprobs_keep_their_bits():
    """A rounding on the way into the batch would look like a broken promise."""
    values = tuple(torch.randn(6, generator=torch.Generator().manual_seed(0)).neg().tolist())
    [batch] = pack_samples([sample(1, 1, 6, logprobs=values)], 100)
    assert tuple(batch.rollout_logprobs.tolist()) == values


def test_supervised_samples_have_no_logprobs():
    """Samples without a rollout are trained on, but not compared; a mixture is an error."""
    [batch] = pack_samples([sample(1, 2, 2), sample(2, 1, 1)], 100)
    assert batch.rollout_logprobs is None
    message = "some samples .* have rollout logprobs and some have none"
    with pytest.raises(ValueError, match=message):
        pack_samples([SAMPLES[0], sample(9, 2, 2)], 100)


def test_a_sample_that_fits_no_batch_is_named():
    """The message must say which sample and which setting."""
    message = "sample 4 has 8 tokens; trainer.micro_batch_tokens is 7"
    with pytest.raises(ValueError, match=message):
        pack_samples(SAMPLES, 7)
    with pytest.raises(ValueError, match="no samples to train on"):
        pack_samples([], 100)


@pytest.mark.parametrize("prompt_len", [0, 3, 4])
def test_a_sample_needs_a_prompt_and_a_response(prompt_len):
    """Without a prompt there is nothing to condition on, without a response nothing to learn."""
    with pytest.raises(ValueError, match=f"sample 7: prompt_len {prompt_len} must leave"):
        Sample.of_response(sample_id=7, token_ids=(1, 2, 3), prompt_len=prompt_len)


def test_logprobs_must_be_one_per_response_token():
    """Shifted log-probs would be compared with the wrong tokens."""
    with pytest.raises(ValueError, match="sample 7: 2 logprobs for a response of 1 tokens"):
        Sample.of_response(sample_id=7, token_ids=(1, 2, 3), prompt_len=2, logprobs=(-1.0, -2.0))
    masked = Sample(sample_id=7, token_ids=(1, 2, 3, 4), loss_mask=(0, 1, 0, 1))
    for logprobs in ([-1.0], [-1.0] * 3):
        with pytest.raises(ValueError, match=f"sample 7: {len(logprobs)} logprobs for .* 2 tokens"):
            masked.with_logprobs(logprobs)


def test_every_copy_gets_a_micro_batch(random_samples):
    """Whatever lengths were drawn: the fullest micro-batches are halved, in the same order."""
    samples = random_samples(7, seed=2)
    for at_least in (1, 2, 5, 7, 9):
        batches = pack_samples(samples, 10_000, at_least=at_least)
        assert len(batches) == min(at_least, 7)
        assert [s for b in batches for s in b.samples] == samples
        sizes = [len(b.samples) for b in batches]
        assert max(sizes) <= 2 * min(sizes)


def test_micro_batches_are_shared_out_evenly(random_samples):
    """Every one goes to one rank, tokens are nearly even, and order within a rank is kept."""
    batches = pack_samples(random_samples(60, seed=2), 90)
    for num_ranks in (1, 2, 3, 4):
        shares = share_batches(batches, num_ranks)
        assert sorted(b.index for share in shares for b in share) == [b.index for b in batches]
        assert all([b.index for b in s] == sorted(b.index for b in s) for s in shares)
        loads = [sum(b.num_tokens for b in share) for share in shares]
        assert max(loads) - min(loads) <= 90
        assert share_batches(batches, num_ranks) == shares
    with pytest.raises(ValueError, match="2 micro-batches for 3 data ranks"):
        share_batches(batches[:2], 3)


def test_samples_must_fit_the_model(qwen3_path):
    """To the last position and the last token of the vocabulary, and not one further."""
    model = replace(load_model_config(qwen3_path), max_position=5, vocab_size=105)
    longest = sample(1, 2, 3)
    [batch] = pack_samples([longest], 100, model=model)
    assert batch.input_ids.tolist() == [100, 101, 102, 103, 104]
    with pytest.raises(ValueError, match="sample 1 has 6 tokens; the model's context holds 5"):
        pack_samples([longest, sample(1, 2, 4)], 100, model=model)
    with pytest.raises(ValueError, match=r"sample 2: token 201 is outside the vocabulary \[0, 105"):
        pack_samples([sample(2, 1, 1)], 100, model=model)
    one_more = Sample.of_response(sample_id=3, token_ids=(1, 105), prompt_len=1)
    with pytest.raises(ValueError, match="sample 3: token 105 is outside"):
        pack_samples([one_more], 100, model=model)
    with pytest.raises(ValueError, match="sample 3: token -1 is outside"):
        pack_samples([replace(one_more, token_ids=(-1, 1))], 100, model=model)


def test_the_fullest_rank_is_never_given_more():
    """Longest first, each to whoever has least, in the order of ranks; written out by hand."""
    lens = (5, 9, 2, 7, 4, 4)
    batches = pack_samples([sample(i, 1, n - 1) for i, n in enumerate(lens)], 9)
    assert [b.num_tokens for b in batches] == [5, 9, 9, 8]
    found = [[b.index for b in share] for share in share_batches(batches, 2)]
    assert found == [[1, 3], [0, 2]]
    found = [[b.index for b in share] for share in share_batches(batches, 3)]
    assert found == [[1], [2], [0, 3]]


def test_segments_are_cut_by_number_alone():
    """Neighbours, as equal as they can be; of fewer samples than segments some are empty."""
    cut = {(n, size): [len(part) for part in segments_of(range(n), size)]
           for n, size in ((8, 4), (6, 4), (3, 4), (1, 4), (5, 1), (7, 2))}  # fmt: skip
    assert cut == {
        (8, 4): [2, 2, 2, 2],
        (6, 4): [1, 2, 1, 2],
        (3, 4): [0, 1, 1, 1],
        (1, 4): [0, 0, 0, 1],
        (5, 1): [5],
        (7, 2): [3, 4],
    }
    assert [x for part in segments_of(range(6), 4) for x in part] == list(range(6))


@pytest.mark.parametrize("max_tokens", [9, 13, 100])
def test_a_segment_is_packed_as_if_it_were_alone(max_tokens):
    """So a micro-batch does not depend on who has the other segments; units stay whole."""
    samples = [replace(s, unit=u) for s, u in zip(SAMPLES, (None, 5, 5, None), strict=True)]
    units = units_of(samples)
    batches = pack_samples(samples, max_tokens, num_segments=4)
    assert [b.index for b in batches] == list(range(len(batches)))
    assert [b.segment for b in batches] == sorted(b.segment for b in batches)
    for segment, part in enumerate(segments_of(units, 4)):
        own = [b.samples for b in batches if b.segment == segment]
        flat = [s for unit in part for s in unit]
        alone = [b.samples for b in pack_samples(flat, max_tokens)] if flat else []
        assert own == alone
    assert [len(part) for part in segments_of(units, 4)] == [0, 1, 1, 1]
