"""attention on the CPU: query rows in tiles of one shape, key tiles in ascending order.

The query rows (the heads of one KV head at consecutive positions) come in tiles of 16, so that
every product has one shape, whatever the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionPlan
from samebit.kernels.contract import CPU_KV_TILE as KV_TILE
from samebit.kernels.contract import CPU_QUERY_TILE as Q_TILE


@dataclass(frozen=True)
class KeyTile:
    """The j-th key tile of every query tile that reaches it: the first `num_tiles` query tiles."""

    num_tiles: int
    kv_slots: Tensor  # [num_tiles, KV_TILE] int64, rows of the flat cache
    masked_from: int  # query tiles before this one see the whole key tile
    hidden: Tensor  # [num_tiles - masked_from, Q_TILE, KV_TILE] bool, True: not visible
    stale: Tensor  # [num_tiles - masked_from, KV_TILE] bool, True: past the sequence's end


@dataclass(frozen=True)
class CpuAttentionPlan(AttentionPlan):
    """Says which rows meet which keys; it is made once per batch and used by every layer."""

    tile_rows: Tensor  # [tiles, Q_TILE] int64: row (token * Hq / Hkv + head)
    row_places: Tensor  # [rows] int64: where each row stands among the flattened tiles
    tile_seq: Tensor  # [tiles] int64
    key_tiles: tuple[KeyTile, ...]
    num_seqs: int


def plan_step(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: Tensor,
    page_size: int,
    heads_per_kv: int,
) -> CpuAttentionPlan:
    """See AttentionKind; heads_per_kv is Hq / Hkv."""
    page_of = page_table.numpy()
    position = np.arange(-(-max(context_lens) // KV_TILE) * KV_TILE)
    page_index = np.minimum(position // page_size, page_of.shape[1] - 1)
    kv_slots = page_of[:, page_index] * page_size + position % page_size
    new, lens = np.asarray(query_lens), np.asarray(context_lens)
    num_rows = new * heads_per_kv
    first_row = np.concatenate([[0], np.cumsum(num_rows)[:-1]])
    tiles_of_seq = -(-num_rows // Q_TILE)
    tile_seq = np.repeat(np.arange(len(new)), tiles_of_seq)
    tile_in_seq = np.arange(len(tile_seq)) - np.repeat(
        np.cumsum(tiles_of_seq) - tiles_of_seq, tiles_of_seq
    )
    # Rows past the end repeat the last row; their results are never read.
    row_in_seq = tile_in_seq[:, None] * Q_TILE + np.arange(Q_TILE)
    row_in_seq = np.minimum(row_in_seq, num_rows[tile_seq][:, None] - 1)
    row_position = (lens - new)[tile_seq][:, None] + row_in_seq // heads_per_kv
    num_key_tiles = row_position[:, -1] // KV_TILE + 1
    # Longest first: the query tiles that reach key tile j are a prefix.
    order = np.argsort(-num_key_tiles, kind="stable")
    tile_seq, row_in_seq, row_position = tile_seq[order], row_in_seq[order], row_position[order]
    tile_rows = first_row[tile_seq][:, None] + row_in_seq
    row_places = np.empty(int(num_rows.sum()), dtype=np.int64)
    row_places[tile_rows] = np.arange(tile_rows.size).reshape(tile_rows.shape)
    reach = np.sort(num_key_tiles)  # ascending: how many query tiles have more than j key tiles
    key_tiles = tuple(
        _key_tile(j, reach, tile_seq, row_position, kv_slots, lens) for j in range(int(reach[-1]))
    )
    return CpuAttentionPlan(
        tile_rows=torch.from_numpy(tile_rows),
        row_places=torch.from_numpy(row_places),
        tile_seq=torch.from_numpy(tile_seq),
        key_tiles=key_tiles,
        num_seqs=len(new),
    )


def plan_context(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    key_starts: Sequence[int],
    num_keys: int,
    heads_per_kv: int,
) -> CpuAttentionPlan:
    """See AttentionKind; the keys lie as in pages of one token. heads_per_kv is Hq / Hkv."""
    pages = torch.tensor(key_starts)[:, None] + torch.arange(max(context_lens))
    return plan_step(query_lens, context_lens, pages.clamp(max=num_keys - 1), 1, heads_per_kv)


def _key_tile(
    j: int,
    reach: np.ndarray,
    tile_seq: np.ndarray,
    row_position: np.ndarray,
    kv_slots: np.ndarray,
    context_lens: np.ndarray,
) -> KeyTile:
    num_tiles = len(reach) - int(np.searchsorted(reach, j, side="right"))
    # A query tile spans at most 16 positions, so only its last two key tiles can be cut.
    masked_from = len(reach) - int(np.searchsorted(reach, j + 2, side="right"))
    position = np.arange(j * KV_TILE, (j + 1) * KV_TILE)
    cut = slice(masked_from, num_tiles)
    return KeyTile(
        num_tiles=num_tiles,
        kv_slots=torch.from_numpy(kv_slots[tile_seq[:num_tiles], j * KV_TILE : (j + 1) * KV_TILE]),
        masked_from=masked_from,
        hidden=torch.from_numpy(position > row_position[cut][:, :, None]),
        stale=torch.from_numpy(position >= context_lens[tile_seq[cut]][:, None]),
    )


def _to_tiles(x: Tensor, num_kv: int, plan: CpuAttentionPlan) -> Tensor:
    """[T, Hq, Dh] -> [tiles, Hkv, Q_TILE, Dh]."""
    num_tokens, _, head_dim = x.shape
    rows = x.view(num_tokens, num_kv, -1, head_dim).transpose(1, 2).reshape(-1, num_kv, head_dim)
    return rows[plan.tile_rows].transpose(1, 2).contiguous()


def _from_tiles(tiles: Tensor, shape: torch.Size, plan: CpuAttentionPlan) -> Tensor:
    """[tiles, Hkv, Q_TILE, Dh] -> [T, Hq, Dh]."""
    num_kv, head_dim = tiles.shape[1], tiles.shape[3]
    rows = tiles.transpose(1, 2).reshape(-1, num_kv, head_dim)[plan.row_places]
    return rows.view(shape[0], -1, num_kv, head_dim).transpose(1, 2).reshape(shape)


def lse_of_rows(lse: Tensor, num_heads: int, plan: CpuAttentionPlan) -> Tensor:
    """Log-sum-exps [tiles, Hkv, Q_TILE] -> [T, Hq]."""
    num_tokens = len(plan.row_places) * lse.shape[1] // num_heads
    shape = torch.Size((num_tokens, num_heads, 1))
    return _from_tiles(lse[..., None], shape, plan).squeeze(-1)


def lse_of_tiles(lse: Tensor, num_kv: int, plan: CpuAttentionPlan) -> Tensor:
    """Log-sum-exps [T, Hq] -> [tiles, Hkv, Q_TILE]."""
    return _to_tiles(lse[..., None], num_kv, plan).squeeze(-1)


def _gather(cache: Tensor, tile: KeyTile) -> Tensor:
    """[kv_slots, Hkv, Dh] -> [num_tiles * Hkv, KV_TILE, Dh]."""
    return cache[tile.kv_slots].transpose(1, 2).reshape(-1, KV_TILE, cache.shape[-1])


def _scores(q: Tensor, keys: Tensor, tile: KeyTile, scale: float) -> Tensor:
    """[num_tiles, Hkv, Q_TILE, KV_TILE], -inf where hidden."""
    num_kv, head_dim = q.shape[1], q.shape[3]
    products = torch.bmm(
        q[: tile.num_tiles].reshape(-1, Q_TILE, head_dim), keys.transpose(1, 2)
    ).view(tile.num_tiles, num_kv, Q_TILE, KV_TILE)
    scores = products.mul_(scale)
    scores[tile.masked_from :].masked_fill_(tile.hidden[:, None], float("-inf"))
    return scores


def _clean_values(v: Tensor, tile: KeyTile, num_kv: int) -> Tensor:
    values = _gather(v, tile)
    by_tile = values.view(tile.num_tiles, num_kv, KV_TILE, -1)
    by_tile[tile.masked_from :].masked_fill_(tile.stale[:, None, :, None], 0.0)
    return values


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: CpuAttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, Hq, Dh] to k and v [kv_slots, Hkv, Dh].

    Returns the output [T, Hq, Dh] and the log-sum-exps [tiles, Hkv, Q_TILE].
    """
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


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: CpuAttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.attention: the keys must be packed (every kv_slot belongs to one sequence)."""
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
        _add_to_kv_slots(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries), tile, plan)
        _add_to_kv_slots(grad_v, torch.bmm(weights.transpose(1, 2), grad_out), tile, plan)
    return _from_tiles(grad_q, q.shape, plan), grad_k, grad_v


def _add_to_kv_slots(total: Tensor, part: Tensor, tile: KeyTile, plan: CpuAttentionPlan) -> None:
    """Add part [num_tiles * Hkv, KV_TILE, Dh] to the tiles' kv_slots of total [kv_slots, Hkv, Dh].

    It is summed over the query tiles of each part of a sequence, in tile order, then part by part.
    """
    num_kv, head_dim = total.shape[1:]
    seqs = plan.tile_seq[: tile.num_tiles]
    per_seq = total.new_zeros(plan.num_seqs, num_kv, KV_TILE, head_dim)
    per_seq.index_add_(0, seqs, part.view(-1, num_kv, KV_TILE, head_dim))
    live = torch.ones_like(tile.kv_slots, dtype=torch.bool)
    live[tile.masked_from :] = ~tile.stale
    once = torch.from_numpy(np.unique(seqs.numpy(), return_index=True)[1])
    live, kv_slots, seqs = live[once], tile.kv_slots[once], seqs[once]
    seq_of_kv_slot = seqs[:, None].expand_as(kv_slots)[live]
    place = torch.arange(KV_TILE).expand_as(kv_slots)[live]
    total.index_add_(0, kv_slots[live], per_seq[seq_of_kv_slot, :, place])
