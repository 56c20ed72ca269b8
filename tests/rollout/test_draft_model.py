"""The draft's forward against a plain one; its configuration and vocabulary."""

import numpy as np
import pytest
import torch
from draft_cases import (
    LLAMA3,
    OPTIONS,
    make_config,
    make_params,
    make_vocabulary,
    plain_fuse,
    plain_mask,
    plain_step,
    plain_tensors,
)
from helpers import assert_same_bits

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.rope import rope
from samebit.rollout.models.draft.config import EMBEDDING, DraftConfig, default_layers
from samebit.rollout.models.draft.decoder import DraftDecoder, split_heads
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.mapping import hf_shapes

CPU = torch.device("cpu")
LENS = (3, 20, 9)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_steps_are_a_plain_forwards(name):
    """Fusion, a step on it, a step on what that fed back or on masks: values, and gradients of all
    weights."""
    config = make_config(**OPTIONS[name])
    params = make_params(config)
    w = plain_tensors(config, params)
    leaves = {key: p.requires_grad_() for key, p in params.items()}
    generator = torch.Generator().manual_seed(5)
    T, Dt = sum(LENS), config.target_hidden_size
    features = [torch.randn(T, Dt, generator=generator) for _ in config.captured_layers]
    token_ids = torch.randint(61, (2, T), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENS])
    target = torch.randn(61, 24, generator=generator)
    embedding = leaves.get(EMBEDDING, target)
    plain_embedding = w.get("embed_tokens.weight", target.double())
    draft = DraftDecoder(config, leaves, embedding)
    attention = CanonicalAttention(draft.heads, CPU)
    plan, table = attention.plan_packed(LENS), config.rope_table(64, CPU)

    def attend(qkv):
        q, k, v = split_heads(qkv, draft.heads)
        q, k = rope(q, positions, table), rope(k, positions, table)
        return attention.attend_packed(q, k, v.contiguous(), plan)

    def plain_attend(q, k, v):
        return plain_causal(q, k, v, LENS, config.head_dim**-0.5)

    states, expected = draft.fuse(features), plain_fuse(config, w, [x.double() for x in features])
    for i, ids in enumerate(token_ids):
        if i and config.is_block:
            ids = torch.full_like(ids, config.mask_token_id)
            states, expected = (
                mask.expand(T, -1) for mask in (draft.mask_state(), plain_mask(config, w))
            )
        states, final = draft.step(states, ids, attend)
        expected, plain_final = plain_step(
            config, w, expected, ids, positions, plain_embedding, plain_attend
        )
        torch.testing.assert_close(states.double(), expected, rtol=0, atol=2e-5)
    logits = draft.logits(final)
    assert logits.shape == (T, 29)
    plain_logits = plain_final @ w["lm_head.weight"].t()
    torch.testing.assert_close(logits.double(), plain_logits, rtol=0, atol=2e-5)
    grad = torch.randn(logits.shape, generator=generator)
    logits.backward(grad)
    plain_logits.backward(grad.double())
    gradients = plain_tensors(config, {key: p.grad for key, p in leaves.items()})
    for key, found in gradients.items():
        scale = float(w[key].grad.abs().max())
        torch.testing.assert_close(found, w[key].grad, rtol=0, atol=1e-5 * max(1, scale), msg=key)


def plain_causal(q, k, v, lens, scale):
    """attention_ref in fp64."""
    group, outputs = q.shape[1] // k.shape[1], []
    for a, b, c in zip(*(x.split(lens) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(group, 1) for x in (b, c))
        scores = torch.einsum("qnh,knh->nqk", a, keys) * scale
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(
            torch.einsum(
                "nqk,knh->qnh", scores.masked_fill(mask, float("-inf")).softmax(-1), values
            )
        )
    return torch.cat(outputs)


def test_a_row_has_the_same_bits_in_any_company():
    """So an engine may draft for one sample alone or for many."""
    config = make_config(**OPTIONS["eagle3.1"])
    params, generator = make_params(config), torch.Generator().manual_seed(1)
    draft = DraftDecoder(config, params, torch.randn(61, 24, generator=generator))
    features = [torch.randn(40, 24, generator=generator) for _ in range(3)]
    ids = torch.randint(61, (40,), generator=generator)

    def attend(qkv):
        return split_heads(qkv, draft.heads)[0]

    fused = draft.fuse(features)
    _, final = draft.step(fused, ids, attend)
    alone = draft.fuse([x[7:8] for x in features])
    _, final_alone = draft.step(alone, ids[7:8], attend)
    assert_same_bits(draft.logits(final_alone), draft.logits(final)[7:8])


def test_main_grads_and_fp32_norms_give_the_same_gradients():
    """As a trainer gives them: the matrices' go to its buffers, and autograd gets none."""
    config = make_config()
    params = {k: p.requires_grad_() for k, p in make_params(config).items()}
    main = {k: torch.zeros_like(p) for k, p in params.items() if p.dim() == 2}
    features = [torch.randn(9, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    embedding, ids = torch.ones(61, 24), torch.arange(9)
    for buffers in ({}, main):
        draft = DraftDecoder(config, params, embedding, main_grads=buffers)
        _, final = draft.step(
            draft.fuse(features), ids, lambda qkv, d=draft: split_heads(qkv, d.heads)[0]
        )
        final.square().sum().backward()
        if not buffers:
            expected = {k: p.grad for k, p in params.items()}
            for p in params.values():
                p.grad = None
    for name, param in params.items():
        if name in main and expected[name] is not None:
            assert param.grad is None
            assert_same_bits(main[name], expected[name], name)
        elif expected[name] is not None:
            assert_same_bits(param.grad, expected[name], name)


def test_a_new_draft_of_a_target(qwen3_path):
    target = load_model_config(qwen3_path)
    with pytest.raises(ValueError, match="a target of 3 layers has no default captured_layers"):
        DraftConfig.of_target(target, 100)
    with pytest.raises(ValueError, match="the target has streams after 0 to 3 layers"):
        DraftConfig.of_target(target, 100, (1, 4))
    config = DraftConfig.of_target(target, 100, (1, 2, 3), fc_norm=True)
    assert (config.hidden_size, config.target_hidden_size) == (48, 48)
    shapes = hf_shapes(config.param_specs())
    assert shapes["fc.weight"] == (48, 144)
    assert shapes["fc_norm.2.weight"] == (48,)
    assert shapes["lm_head.weight"] == (100, 48)
    assert default_layers(32) == (2, 16, 29)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": 62}, "draft_vocab_size is 62; it must be at most vocab_size = 61"),
        ({"captured_layers": ()}, r"captured_layers is \(\); it must be layers from 0 on"),
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm is True; it must be false where"),
        ({"target_hidden_size": 20}, r"owns_embedding is False; it must be true \(embed_tokens"),
        ({"num_heads": 3}, "num_heads is 3; it must be a multiple of num_kv_heads = 2"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"ffn_size": 0}, "ffn_size is 0; it must be an integer of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_the_rotation_may_be_scaled():
    scaled, plain = (make_config(rope_scaling=s).rope_table(64, CPU) for s in (LLAMA3, None))
    assert scaled.shape == plain.shape == (64, 6)
    assert not torch.equal(scaled, plain)


def test_the_vocabulary_is_the_most_frequent_tokens():
    """Ties go to the lower id, and unused tokens fill up."""
    counts = np.array([0, 5, 0, 7, 5, 0, 9])
    vocabulary = DraftVocabulary.most_frequent(counts, 3)
    assert vocabulary.token_ids.tolist() == [1, 3, 6]
    assert vocabulary.d2t.tolist() == [1, 2, 4]
    assert vocabulary.t2d.tolist() == [False, True, False, True, False, False, True]
    assert DraftVocabulary.most_frequent(counts, 5).token_ids.tolist() == [0, 1, 3, 4, 6]
    with pytest.raises(ValueError, match=r"draft_vocab_size is 8; it must be in \[1, 7\]"):
        DraftVocabulary.most_frequent(counts, 8)


def test_both_tensors_must_name_the_same_tokens():
    vocabulary = make_vocabulary(make_config())
    again = DraftVocabulary.from_tensors(vocabulary.d2t, vocabulary.t2d)
    assert torch.equal(again.token_ids, vocabulary.token_ids)
    wrong = vocabulary.d2t.clone()
    wrong[5] += 1
    found, right = int(wrong[5]) + 5, int(vocabulary.token_ids[5])
    with pytest.raises(ValueError, match=f"draft token 5 is {found} by d2t, {right} by t2d"):
        DraftVocabulary.from_tensors(wrong, vocabulary.t2d)
    with pytest.raises(ValueError, match="another number of tokens"):
        DraftVocabulary.from_tensors(wrong[:-1], vocabulary.t2d)
