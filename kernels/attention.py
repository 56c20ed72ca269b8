"""attention: causal attention over keys in a paged cache or in a packed batch, one result for all.

Contract: keys are taken in tiles of KV_TILE tokens at absolute positions, in ascending order, by
an online softmax (running max, sum and accumulator; each tile rescales the earlier ones). A query's
result depends on its own keys alone: decode, chunked prefill and the packed training forward are
the same operations on the same tiles. Keys a query may not see get a score of -inf; a value beyond
the sequence's end is replaced by zero before the product (stale memory may hold NaN).

CPU: query rows (the heads of one kv head at consecutive positions) in tiles of 16, so that every
product has one shape, 16 x KV_TILE, whatever the batch. Source of the online softmax: Milakov and
Gimelshein 2018, arXiv 1805.02867; of the backward: Dao et al. 2022, arXiv 2205.14135.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from samebit.kernels.op import Op, require_fp32

KV_TILE = 64  # on the CPU, where there is one split
Q_TILE = 16
# Part of the numerics contract on GPUs, settled by one sweep on an H200:
# docs/results/h200_attention_constants.json. Changing them changes bits.
GPU_KV_TILE = 128
GPU_KV_SPLIT = 1024


@dataclass(frozen=True)
class KeyTile:
    """The j-th key tile of every query tile that reaches it: the first `num_tiles` query tiles."""

    num_tiles: int
    slots: torch.Tensor  # [num_tiles, KV_TILE] int64, rows of the flat cache
    masked_from: int  # query tiles before this one see the whole key tile
    hidden: torch.Tensor  # [num_tiles - masked_from, Q_TILE, KV_TILE] bool, True: not visible
    stale: torch.Tensor  # [num_tiles - masked_from, KV_TILE] bool, True: past the sequence's end


@dataclass(frozen=True)
class AttentionPlan:
    """CPU: which rows meet which keys; made once per batch, used by every layer."""

    tile_rows: torch.Tensor  # [tiles, Q_TILE] int64: row (token * heads per kv head + head)
    row_places: torch.Tensor  # [rows] int64: where each row stands among the flattened tiles
    tile_seq: torch.Tensor  # [tiles] int64
    key_tiles: tuple[KeyTile, ...]
    num_seqs: int


def plan_paged(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: torch.Tensor,
    page_size: int,
    heads_per_kv: int,
    device: torch.device | str = "cpu",
) -> Any:
    """Plan for queries whose keys lie in pages; what it is, is the device's own business.

    query_lens [B]: new tokens of each sequence, the last ones of its context_lens [B] tokens
    (new ones included). page_table [B, max_pages] int64 on the CPU: page ids in order of position.
    """
    if torch.device(device).type == "cuda":
        from samebit.kernels.gpu.attention import plan

        return plan(query_lens, context_lens, page_table, page_size, torch.device(device))
    page_of = page_table.numpy()
    max_len = int(max(context_lens))
    position = np.arange(-(-max_len // KV_TILE) * KV_TILE)
    page_index = np.minimum(position // page_size, page_of.shape[1] - 1)
    slots = page_of[:, page_index] * page_size + position % page_size
    return _plan(np.asarray(query_lens), np.asarray(context_lens), slots, heads_per_kv)


def plan_packed(
    seq_lens: Sequence[int], heads_per_kv: int, device: torch.device | str = "cpu"
) -> Any:
    """Plan for whole sequences packed one behind another: the training forward."""
    starts = [0, *itertools.accumulate(seq_lens)]
    return plan_context(seq_lens, seq_lens, starts[:-1], starts[-1], heads_per_kv, device)


def plan_context(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    key_starts: Sequence[int],
    num_keys: int,
    heads_per_kv: int,
    device: torch.device | str = "cpu",
) -> Any:
    """Plan for parts of sequences whose keys are packed: queries of a context parallel rank.

    query_lens [B]: tokens of each part, the last of its context_lens [B] tokens; key_starts [B]:
    the first row of its sequence's keys among num_keys. Parts may share a sequence.
    """
    if torch.device(device).type == "cuda":
        from samebit.kernels.gpu.attention import plan

        return plan(query_lens, context_lens, None, 1, torch.device(device), key_starts, num_keys)
    lens = np.asarray(context_lens)
    position = np.arange(-(-int(lens.max()) // KV_TILE) * KV_TILE)
    slots = np.minimum(np.asarray(key_starts)[:, None] + position, num_keys - 1)
    return _plan(np.asarray(query_lens), lens, slots, heads_per_kv)


def _plan(
    query_lens: np.ndarray, context_lens: np.ndarray, slots: np.ndarray, heads_per_kv: int
) -> AttentionPlan:
    num_rows = query_lens * heads_per_kv
    first_row = np.concatenate([[0], np.cumsum(num_rows)[:-1]])
    tiles_of_seq = -(-num_rows // Q_TILE)
    tile_seq = np.repeat(np.arange(len(query_lens)), tiles_of_seq)
    tile_in_seq = np.arange(len(tile_seq)) - np.repeat(
        np.cumsum(tiles_of_seq) - tiles_of_seq, tiles_of_seq
    )
    # Rows past the end repeat the last row; their results are never read.
    row_in_seq = tile_in_seq[:, None] * Q_TILE + np.arange(Q_TILE)
    row_in_seq = np.minimum(row_in_seq, num_rows[tile_seq][:, None] - 1)
    row_position = (context_lens - query_lens)[tile_seq][:, None] + row_in_seq // heads_per_kv
    num_key_tiles = row_position[:, -1] // KV_TILE + 1
    # Longest first: the query tiles that reach key tile j are a prefix.
    order = np.argsort(-num_key_tiles, kind="stable")
    tile_seq, row_in_seq, row_position = tile_seq[order], row_in_seq[order], row_position[order]
    tile_rows = first_row[tile_seq][:, None] + row_in_seq
    row_places = np.empty(int(num_rows.sum()), dtype=np.int64)
    row_places[tile_rows] = np.arange(tile_rows.size).reshape(tile_rows.shape)
    reach = np.sort(num_key_tiles)  # ascending: how many query tiles have more than j key tiles
    key_tiles = [
        _key_tile(j, len(reach), reach, tile_seq, row_position, slots, context_lens)
        for j in range(int(reach[-1]))
    ]
    return AttentionPlan(
        tile_rows=torch.from_numpy(tile_rows),
        row_places=torch.from_numpy(row_places),
        tile_seq=torch.from_numpy(tile_seq),
        key_tiles=tuple(key_tiles),
        num_seqs=len(query_lens),
    )


def _key_tile(
    j: int,
    num_all: int,
    reach: np.ndarray,
    tile_seq: np.ndarray,
    row_position: np.ndarray,
    slots: np.ndarray,
    context_lens: np.ndarray,
) -> KeyTile:
    num_tiles = num_all - int(np.searchsorted(reach, j, side="right"))
    # A query tile spans at most 16 positions, so only its last two key tiles can be cut.
    masked_from = num_all - int(np.searchsorted(reach, j + 2, side="right"))
    position = np.arange(j * KV_TILE, (j + 1) * KV_TILE)
    cut = slice(masked_from, num_tiles)
    return KeyTile(
        num_tiles=num_tiles,
        slots=torch.from_numpy(slots[tile_seq[:num_tiles], j * KV_TILE : (j + 1) * KV_TILE]),
        masked_from=masked_from,
        hidden=torch.from_numpy(position > row_position[cut][:, :, None]),
        stale=torch.from_numpy(position >= context_lens[tile_seq[cut]][:, None]),
    )


def attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: Sequence[int], scale: float
) -> torch.Tensor:
    """Packed causal attention in plain torch. q [T, N, H], k and v [T, K, H] -> [T, N, H]."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    lens = list(seq_lens)
    for q_L, k_L, v_L in zip(q.split(lens), k.split(lens), v.split(lens), strict=True):
        keys, values = (x.repeat_interleave(group, 1).float() for x in (k_L, v_L))
        scores = torch.einsum("qnh,knh->nqk", q_L.float(), keys) * scale
        causal = torch.ones(len(q_L), len(q_L), dtype=torch.bool, device=q.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nqk,knh->qnh", weights, values).to(q.dtype))
    return torch.cat(outputs)


def _to_tiles(x: torch.Tensor, num_kv: int, plan: AttentionPlan) -> torch.Tensor:
    """[T, N, H] -> [tiles, K, Q_TILE, H]."""
    num_tokens, _, head_dim = x.shape
    rows = x.view(num_tokens, num_kv, -1, head_dim).transpose(1, 2).reshape(-1, num_kv, head_dim)
    return rows[plan.tile_rows].transpose(1, 2).contiguous()


def _from_tiles(tiles: torch.Tensor, shape: torch.Size, plan: AttentionPlan) -> torch.Tensor:
    """[tiles, K, Q_TILE, H] -> [T, N, H]."""
    num_kv, head_dim = tiles.shape[1], tiles.shape[3]
    rows = tiles.transpose(1, 2).reshape(-1, num_kv, head_dim)[plan.row_places]
    return rows.view(shape[0], -1, num_kv, head_dim).transpose(1, 2).reshape(shape)


def _gather(cache: torch.Tensor, tile: KeyTile) -> torch.Tensor:
    """[slots, K, H] -> [num_tiles * K, KV_TILE, H]."""
    return cache[tile.slots].transpose(1, 2).reshape(-1, KV_TILE, cache.shape[-1])


def _scores(q: torch.Tensor, keys: torch.Tensor, tile: KeyTile, scale: float) -> torch.Tensor:
    """[num_tiles, K, Q_TILE, KV_TILE], -inf where hidden."""
    num_kv, head_dim = q.shape[1], q.shape[3]
    products = torch.bmm(
        q[: tile.num_tiles].reshape(-1, Q_TILE, head_dim), keys.transpose(1, 2)
    ).view(tile.num_tiles, num_kv, Q_TILE, KV_TILE)
    scores = products.mul_(scale)
    scores[tile.masked_from :].masked_fill_(tile.hidden[:, None], float("-inf"))
    return scores


def _clean_values(v: torch.Tensor, tile: KeyTile, num_kv: int) -> torch.Tensor:
    values = _gather(v, tile)
    by_tile = values.view(tile.num_tiles, num_kv, KV_TILE, -1)
    by_tile[tile.masked_from :].masked_fill_(tile.stale[:, None, :, None], 0.0)
    return values


def _attend_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, N, H]; k, v [slots, K, H] -> (output [T, N, H], log-sum-exp [tiles, K, Q_TILE])."""
    require_fp32("attention", q, k, v)
    num_kv, head_dim = k.shape[1:]
    q_tiles = _to_tiles(q, num_kv, plan)
    acc = torch.zeros_like(q_tiles)
    row_max = q_tiles.new_full(q_tiles.shape[:3], float("-inf"))
    row_sum = torch.zeros_like(row_max)
    for tile in plan.key_tiles:
        n = tile.num_tiles
        scores = _scores(q_tiles, _gather(k, tile), tile, scale)
        new_max = torch.maximum(row_max[:n], scores.amax(-1))
        rescale = torch.exp(row_max[:n] - new_max)
        weights = torch.exp(scores.sub_(new_max[..., None]))
        product = torch.bmm(weights.view(-1, Q_TILE, KV_TILE), _clean_values(v, tile, num_kv)).view(
            n, num_kv, Q_TILE, head_dim
        )
        row_sum[:n] = row_sum[:n] * rescale + weights.sum(-1)
        acc[:n] = acc[:n] * rescale[..., None] + product
        row_max[:n] = new_max
    output = _from_tiles(acc / row_sum[..., None], q.shape, plan)
    return output, row_max + torch.log(row_sum)


def _attend_backward_cpu(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. Keys must be packed (every slot belongs to one sequence)."""
    num_kv, head_dim = k.shape[1:]
    q_tiles, grad_tiles = _to_tiles(q, num_kv, plan), _to_tiles(grad, num_kv, plan)
    # Rows that only fill up a tile repeat a real row: they must add nothing.
    filler = torch.ones(plan.tile_rows.numel(), dtype=torch.bool)
    filler[plan.row_places] = False
    grad_tiles.masked_fill_(filler.view(-1, 1, Q_TILE, 1), 0.0)
    delta = (grad_tiles * _to_tiles(output, num_kv, plan)).sum(-1)
    grad_q = torch.zeros_like(q_tiles)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for tile in plan.key_tiles:
        n = tile.num_tiles
        keys, values = _gather(k, tile), _clean_values(v, tile, num_kv)
        weights = torch.exp(_scores(q_tiles, keys, tile, scale) - lse[:n, ..., None])
        weights = weights.view(-1, Q_TILE, KV_TILE)
        grad_out = grad_tiles[:n].reshape(-1, Q_TILE, head_dim)
        grad_weights = torch.bmm(grad_out, values.transpose(1, 2))
        grad_scores = weights * (grad_weights - delta[:n].reshape(-1, Q_TILE, 1)) * scale
        grad_q[:n] += torch.bmm(grad_scores, keys).view(n, num_kv, Q_TILE, head_dim)
        queries = q_tiles[:n].reshape(-1, Q_TILE, head_dim)
        _add_to_slots(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries), tile, plan)
        _add_to_slots(grad_v, torch.bmm(weights.transpose(1, 2), grad_out), tile, plan)
    return _from_tiles(grad_q, q.shape, plan), grad_k, grad_v


def _add_to_slots(
    total: torch.Tensor, part: torch.Tensor, tile: KeyTile, plan: AttentionPlan
) -> None:
    """Add part [num_tiles * K, KV_TILE, H] to the tiles' slots of total [slots, K, H].

    First over the query tiles of each part of a sequence, in tile order, then part by part.
    """
    num_kv, head_dim = total.shape[1:]
    seqs = plan.tile_seq[: tile.num_tiles]
    per_seq = total.new_zeros(plan.num_seqs, num_kv, KV_TILE, head_dim)
    per_seq.index_add_(0, seqs, part.view(-1, num_kv, KV_TILE, head_dim))
    live = torch.ones_like(tile.slots, dtype=torch.bool)
    live[tile.masked_from :] = ~tile.stale
    once = torch.from_numpy(np.unique(seqs.numpy(), return_index=True)[1])
    live, slots, seqs = live[once], tile.slots[once], seqs[once]
    seq_of_slot = seqs[:, None].expand_as(slots)[live]
    place = torch.arange(KV_TILE).expand_as(slots)[live]
    total.index_add_(0, slots[live], per_seq[seq_of_slot, :, place])


_GPU = "samebit.kernels.gpu.attention"
_attend = Op("attention", cpu=_attend_cpu, cuda=f"{_GPU}:attend")
_attend_backward = Op(
    "attention_backward", cpu=_attend_backward_cpu, cuda=f"{_GPU}_backward:attend_backward"
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        output, lse = _attend(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        return *_attend_backward(grad, q, k, v, output, lse, ctx.plan, ctx.scale), None, None


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, scale: float
) -> torch.Tensor:
    """Attention of packed sequences to themselves; differentiable.

    q [T, N, H], k and v [T, K, H], plan from plan_packed, scale usually H**-0.5 -> [T, N, H].
    """
    return _PackedAttention.apply(q, k, v, plan, scale)


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: Any,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens to their sequences' pages, their own keys already written.

    q [T, N, H], caches [P, page_size, K, H], plan from plan_paged -> [T, N, H].
    """
    flat = (-1, *key_cache.shape[2:])
    return _attend(q, key_cache.view(flat), value_cache.view(flat), plan, scale)[0]
