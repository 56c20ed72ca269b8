"""An attention kind from outside the package, in torch's own operations, for CPUs.

Over pages it computes in fp64 and over packed samples in fp32: values are right, bits differ.
"""

from dataclasses import dataclass

import torch

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan


@dataclass(frozen=True)
class PlainPlan(AttentionPlan):
    """Of every part: how many queries it has, and the rows of its keys."""

    query_lens: list[int]
    key_rows: list[torch.Tensor]


class PlainAttention(AttentionKind):
    """One part after another."""

    name = "plain 1.0"
    is_invariant = False

    def plan_step(self, query_lens, context_lens, page_table, page_size):
        place = torch.arange(max(context_lens))
        rows = page_table[:, place // page_size] * page_size + place % page_size
        keys = [row[:n] for row, n in zip(rows, context_lens, strict=True)]
        return PlainPlan(list(query_lens), keys)

    def plan_context(self, query_lens, context_lens, key_starts, num_keys):
        keys = [torch.arange(s, s + n) for s, n in zip(key_starts, context_lens, strict=True)]
        return PlainPlan(list(query_lens), keys)

    def plan_graph(self, entries, max_own=None):
        raise NotImplementedError("there are no CUDA graphs on a CPU")

    def prepare_replay(self, plan, context_lens, table_rows, page_table, shared):
        raise NotImplementedError("there are no CUDA graphs on a CPU")

    def attend(self, q, key_cache, value_cache, plan):
        keys, values = (x.flatten(0, 1) for x in (key_cache, value_cache))
        return self._attend(q, keys, values, plan, torch.float64)

    def attend_packed(self, q, k, v, plan):
        return self._attend(q, k, v, plan, torch.float32)

    def _attend(self, q, k, v, plan, dtype):
        outputs, group = [], self.heads.per_kv
        for query, rows in zip(q.split(plan.query_lens), plan.key_rows, strict=True):
            keys, values = (x[rows].to(dtype).repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", query.to(dtype), keys) * self.heads.scale
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(rows) - len(query))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs).to(q.dtype)
