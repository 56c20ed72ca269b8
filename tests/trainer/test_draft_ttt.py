"""The training-time test against a literal one: every pass's scores and softmax written out."""

import numpy as np
import pytest
import torch
from draft_cases import (
    OPTIONS,
    make_config,
    plain_fuse,
    plain_mask,
    plain_step,
    plain_tensors,
)
from draft_training import NUM_LAYERS, make_batches, make_trainer
from helpers import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from samebit.rollout.models.draft.config import EMBEDDING
from samebit.trainer.draft import ttt
from samebit.trainer.draft.acceptance import accept_lengths
from samebit.trainer.draft.batch import DraftBatch, pack_streams
from samebit.trainer.draft.config import LOSSES, TttConfig
from samebit.trainer.draft.losses import DRAFT_LOSSES, acceptance
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample


def plain_losses(config, w, trainer, data):
    """(losses, rows that count, first choices) of each pass, of [T, V] probabilities in fp64."""
    batch, target = data.batch, trainer._target
    embedding = trainer._draft.embedding.double()
    ids, positions = batch.input_ids, batch.positions
    scale, group = config.head_dim**-0.5, config.num_heads // config.num_kv_heads
    sample = torch.repeat_interleave(
        torch.arange(len(batch.seq_lens)), torch.tensor(batch.seq_lens)
    )
    T = len(ids)
    hidden = (sample[:, None] != sample) | (torch.arange(T)[:, None] < torch.arange(T))
    diagonal = torch.eye(T, dtype=torch.bool)
    masks, keys, values = [], [], []

    def attend(q, k, v):
        masks.append(diagonal if masks else ~hidden)
        keys.append(k.repeat_interleave(group, 1))
        values.append(v.repeat_interleave(group, 1))
        scores = torch.einsum("qnh,knh->nqk", q, torch.cat(keys)) * scale
        scores = scores.masked_fill(~torch.cat(masks, 1), float("-inf"))
        return torch.einsum("nqk,knh->qnh", scores.softmax(-1), torch.cat(values))

    last = data.streams[NUM_LAYERS].double()
    normed = last * torch.rsqrt(last.square().mean(-1, keepdim=True) + config.norm_eps)
    logits = normed * target.final_norm.double() @ target.output_weight.double().t()
    chosen = trainer.vocabulary.token_ids
    p = logits[:, chosen].softmax(-1)
    known = torch.isin(logits.argmax(-1), chosen)
    trained = torch.zeros(T, dtype=torch.bool)
    trained[batch.rows] = True
    streams = [data.streams[layer].double() for layer in config.captured_layers]
    states = plain_fuse(config, w, streams)
    found = []
    for i in range(trainer.ttt.passes):
        shifted = torch.cat([ids[i + 1 :], ids[: i + 1]])
        if i and config.is_block:
            shifted = torch.full_like(ids, config.mask_token_id)
            states = plain_mask(config, w).expand(T, -1)
        states, final = plain_step(config, w, states, shifted, positions + i, embedding, attend)
        log_q = (final @ w["lm_head.weight"].t()).log_softmax(-1)
        losses, rows = [], 0
        for column in range(T):
            row = column + 1 + i
            if row < T and sample[row] == sample[column] and trained[row] and known[row]:
                losses.append(-(p[row] * log_q[column]).sum())
                rows += 1
        found.append((sum(losses, torch.zeros(())), rows, chosen[log_q.argmax(-1)]))
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_the_literal_test(name, monkeypatch):
    """In chunks of 7 rows, over packed samples, some too short for most passes."""
    monkeypatch.setattr(ttt, "chunk_rows", lambda vocab_size, device: 7)
    config = make_config(**OPTIONS[name])
    trainer = make_trainer(config, passes=4, eval_passes=4, clip_grad=0.0)
    [data] = make_batches(config)
    w = plain_tensors(config, trainer.params)
    passes = plain_losses(config, w, trainer, data)
    assert [rows for _, rows, _ in passes] == sorted((r for _, r, _ in passes), reverse=True)
    assert passes[0][1] > passes[3][1] > 5
    expected = sum(loss * 0.8**i for i, (loss, _, _) in enumerate(passes)) / passes[0][1]
    expected.backward()
    expected = float(expected.detach())
    drafted = trainer.choices(trainer.unroll(data, 4), data.batch)
    for i, (_, _, choices) in enumerate(passes):
        assert torch.equal(drafted[i], choices)
    assert abs(trainer.evaluate([data]).loss - expected) < 1e-5
    seen = {}
    monkeypatch.setattr(trainer._adam, "step", lambda grads, lr: seen.update(grads))
    stats = trainer.train_step([data])
    assert abs(stats.loss - expected) < 1e-5
    for i, (loss, rows, _) in enumerate(passes):
        assert abs(stats.metrics[f"loss_{i}"] - float(loss.detach()) / rows) < 1e-5
    if EMBEDDING in trainer.params:
        seen[EMBEDDING] = torch.zeros_like(trainer.params[EMBEDDING])
        w["embed_tokens.weight"].grad = torch.zeros_like(w["embed_tokens.weight"])
    for key, found in plain_tensors(config, seen).items():
        torch.testing.assert_close(found, w[key].grad, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses_are_autograds(name):
    """Of rows that agree, that differ, and that have nothing in common."""
    generator = torch.Generator().manual_seed(2)
    z, target = (3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in "zp")
    target[0] = z[0] + 1e-3 * target[0]
    z[1, 3:], target[1, :3] = -60.0, -60.0
    z.requires_grad_()
    config = TttConfig(loss=name, lk_decay=2.0) if name == "lk_lambda" else TttConfig(loss=name)
    log_p, log_q = target.log_softmax(-1), z.log_softmax(-1)
    losses, slope = DRAFT_LOSSES[name](log_p, log_q.detach(), config)
    p, accepted = log_p.exp(), torch.minimum(log_p, log_q).exp().sum(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    weight = torch.exp(-2.0 * accepted.detach())
    plain = {
        "ce": -(p * log_q).sum(-1),
        "kl": kl,
        "lk_alpha": -accepted.log(),
        "lk_lambda": weight * kl + (1 - weight) * (1 - accepted),
    }[name]
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), z)[0], rtol=1e-9, atol=1e-12)
    total = 1 - 0.5 * (p - log_q.exp()).abs().sum(-1)
    torch.testing.assert_close(acceptance(log_p, log_q), total)


def test_there_is_a_loss_for_every_name():
    assert tuple(DRAFT_LOSSES) == LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_learned(name):
    """A dozen steps on one batch, by each loss, raise the acceptance."""
    config = make_config()
    trainer = make_trainer(config, passes=2, loss=name)
    batches = make_batches(config)
    before = trainer.evaluate(batches).metrics
    for _ in range(12):
        trainer.train_step(batches)
    after = trainer.evaluate(batches).metrics
    for i in range(2):
        assert after[f"acceptance_{i}"] > before[f"acceptance_{i}"] + 0.02, (name, i)


def test_chunks_move_nothing_that_matters(monkeypatch):
    """Rows are the same in any chunk; only the sums' order changes."""
    config = make_config()
    losses = []
    for rows in (3, 1000):
        monkeypatch.setattr(ttt, "chunk_rows", lambda v, d, rows=rows: rows)
        losses.append(make_trainer(config, passes=3).train_step(make_batches(config)).loss)
    assert abs(losses[0] - losses[1]) < 1e-9 * losses[0]


class Largest(TorchDispatchMode):
    """Sees how many elements the largest tensor has that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return made


def test_memory_is_linear_in_the_tokens(monkeypatch):
    """No tensor of a step is [T, T] or [T, Vd]: of twice the tokens the largest is at most twice as
    large, and smaller than either."""
    config = make_config(vocab_size=2000, draft_vocab_size=1500, max_position=600)
    trainer = make_trainer(config, passes=2)
    monkeypatch.setattr(ttt, "chunk_rows", lambda vocab_size, device: 16)
    largest = []
    for length in (256, 512):
        batches = make_batches(config, lens=(length,), max_tokens=length)
        with Largest() as seen:
            trainer.train_step(batches)
        largest.append(seen.numel)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 512 * 512


def test_streams_that_do_not_fit_are_refused():
    config = make_config()
    trainer = make_trainer(config, passes=2)
    [data] = make_batches(config)
    missing = DraftBatch(batch=data.batch, streams={1: data.streams[1]})
    with pytest.raises(ValueError, match="the stream after 2 layers is None; it must be .42, 24."):
        trainer.train_step([missing])
    with pytest.raises(ValueError, match="after 2 layers has 5 tokens; its sample has 7"):
        pack_streams([{2: torch.zeros(5, 24)}], [7], torch.device("cpu"))
    with pytest.raises(
        ValueError, match="has 129 tokens; the draft's max_position_embeddings is 1"
    ):
        trainer.train_step(make_batches(config, lens=(129,), max_tokens=200))
    with pytest.raises(ValueError, match="none of 0 rows counts"):
        trainer.train_step(make_batches(config, lens=(2,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passes": 0}, "ttt.passes is 0; it must be positive"),
        ({"eval_passes": 0}, "ttt.eval_passes is 0; it must be positive"),
        ({"loss": "mse"}, "ttt.loss is 'mse'; it must be one of"),
        ({"loss_decay": 1.5}, r"ttt.loss_decay is 1.5; it must be in \(0, 1\]"),
        ({"lk_decay": 1.0}, "nothing reads it where ttt.loss is 'ce'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TttConfig(**settings)


def test_a_block_draft_needs_a_pass_behind_a_mask():
    with pytest.raises(
        ValueError, match="ttt.passes is 1; it must be at least 2 for a block draft"
    ):
        make_trainer(make_config(**OPTIONS["block"]), passes=1)


def test_accept_lengths_follow_the_chain():
    """By hand: tokens 0 to 9, of which 3 to 9 are drawn; a pass is right if it says t + 2 + i."""
    tokens = np.arange(10)
    rows = np.arange(2, 9)
    right = np.arange(10)[None] + 2 + np.arange(2)[:, None]
    # Token 3 needs no draft. 4 and 5 are accepted, 6 is the target's; then 7 and 8, and 9.
    assert accept_lengths(right, tokens, rows, [10]) == [3, 3]
    wrong = right.copy()
    wrong[1, 2] = 0  # 4 is accepted, 5 is the target's; then 6 and 7, 8; then 9
    assert accept_lengths(wrong, tokens, rows, [10]) == [2, 3, 1]
    assert accept_lengths(0 * right, tokens, rows, [10]) == [1] * 6
    # A stretch that is no neighbour of the one before, and another sample, begin anew.
    gap = np.array([2, 3, 5, 6, 7])
    assert accept_lengths(right, tokens, gap, [10]) == [1, 2]
    assert accept_lengths(right, tokens, np.array([2, 3, 4, 5]), [5, 5]) == [2]


MASK = {"eagle3": {}, "eagle3.1": {}, "block": {"mask_token_id": 3}}


def drafted_chain(config, w, embedding, fused, ids, column, passes, chosen):
    """What a draft says behind column's next token when it really drafts: token by token, each fed
    with the one before or, of a block draft, with a mask; the target's streams are known up to the
    column."""
    keys, values, group = [], [], config.num_heads // config.num_kv_heads

    def attend(q, k, v):
        keys.append(k.repeat_interleave(group, 1))
        values.append(v.repeat_interleave(group, 1))
        scores = torch.einsum("qnh,knh->nqk", q, torch.cat(keys)) * config.head_dim**-0.5
        if len(keys) == 1:
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.einsum("nqk,knh->qnh", scores.softmax(-1), torch.cat(values))

    states, tokens = fused[: column + 1], ids[1 : column + 2]
    positions, said = torch.arange(column + 1), []
    for _ in range(passes):
        states, final = plain_step(config, w, states, tokens, positions, embedding, attend)
        tokens = chosen[(final[-1:] @ w["lm_head.weight"].t()).argmax(-1)]
        states, positions = states[-1:], positions[-1:] + 1
        said.append(int(tokens))
        if config.is_block:
            tokens, states = torch.tensor([config.mask_token_id]), plain_mask(config, w)
    return said


@pytest.mark.parametrize("name", ["eagle3", "eagle3.1", "block"])
def test_accept_lengths_are_those_of_real_drafting(name):
    """Of four tokens chance hits many: chains of every length, to the end of the sample."""
    config = make_config(**OPTIONS[name] | {"vocab_size": 4, "draft_vocab_size": 3} | MASK[name])
    trainer = make_trainer(config, passes=3)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, (60,), generator=generator)
    sample = Sample.of_response(sample_id=0, token_ids=ids.numpy(), prompt_len=5)
    [batch] = pack_samples([sample], 60)
    streams = {layer: torch.randn(60, 24, generator=generator) for layer in (1, 2, 3, NUM_LAYERS)}
    data = DraftBatch(batch=batch, streams=streams)
    drafted = trainer.choices(trainer.unroll(data, 3), batch).numpy()
    found = accept_lengths(drafted, ids.numpy(), batch.rows.numpy(), [60])
    w, embedding = plain_tensors(config, trainer.params), trainer._draft.embedding.double()
    fused = plain_fuse(config, w, [streams[layer].double() for layer in config.captured_layers])
    chosen, column, expected = trainer.vocabulary.token_ids, 4, []
    while column + 2 < 60:
        said = drafted_chain(config, w, embedding, fused, ids, column, 3, chosen)
        right = [a == b for a, b in zip(said, ids[column + 2 :].tolist(), strict=False)]
        accepted = (*right, False).index(False)
        expected.append(min(accepted + 1, 60 - column - 2))
        column += expected[-1]
    assert found == expected
    assert len(set(found)) > 2, "chains of few lengths would test little"


@pytest.mark.parametrize("name", ["eagle3", "block"])
def test_drafts_of_all_passes_are_evaluated_alike(name):
    """Equal parameters have equal figures, whether a draft was trained by two passes or by six; and
    guesses beyond those that it was trained by count."""
    config = make_config(**OPTIONS[name] | {"vocab_size": 4, "draft_vocab_size": 3} | MASK[name])
    few, many = (make_trainer(config, passes=passes, eval_passes=4) for passes in (2, 6))
    [data] = make_batches(config, lens=(60, 50), max_tokens=110)
    found = few.evaluate([data])
    assert found == many.evaluate([data])
    assert "acceptance_3" in found.metrics
    assert "acceptance_4" not in found.metrics
    one = make_trainer(config, passes=2, eval_passes=1).evaluate([data])
    assert found.metrics["accept_length"] > one.metrics["accept_length"]
    assert len(few.train_step([data]).metrics) < len(many.train_step([data]).metrics)


def test_the_same_samples_give_the_same_bytes():
    config = make_config(**OPTIONS["eagle3.1"])
    first, second = (make_trainer(config, passes=3, weight_decay=0.1) for _ in range(2))
    for step in range(3):
        batches = make_batches(config, seed=step, max_tokens=30)
        assert len(batches) > 1
        assert first.train_step(batches) == second.train_step(batches)
    for name, param in first.params.items():
        assert_same_bits(param, second.params[name], name)
