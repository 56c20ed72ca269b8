"""flashinfer: attention of engine and trainer by FlashInfer's kernels, a kind of its own.

FlashInfer divides contexts by the batch, and its tiles by the number of queries: the bits of a
sample depend on its neighbours, and decode's are not those of the training forward. `samebit
verify numerics.attention=flashinfer` says how far they agree. Gradients are those of the canonical
kind: torch's deterministic flash attention, fed with FlashInfer's output and log-sum-exps.

Source: Ye et al. 2025, arXiv 2501.01005.
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention import attend_backward
from samebit.kernels.attention_kind import AttentionKind, AttentionPlan, GraphEntries, Heads
from samebit.kernels.shared_prefixes import SharedPrefixes

VERSION = "0.7.2.post1"
"""Of flashinfer-python: another one is another kind, with bits of its own."""
_WORKSPACE_BYTES = 256 << 20  # for the parts of contexts that are cut up
_TURNS = 3  # plans whose host memory may be read by what is in flight


@dataclass(frozen=True)
class FlashInferPlan(AttentionPlan):
    """A wrapper that has planned a batch; for packed samples also how gradients see it."""

    wrapper: Any
    packed: Any = None  # the canonical kind's plan


class _Turns:
    """Wrappers that plan in turn: one plans anew only when what it had planned is on the device."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._wrappers = [make() for _ in range(_TURNS)]
        self._copied: list[torch.cuda.Event | None] = [None] * _TURNS
        self._turn = 0

    def plan(self, *arguments: Any, **options: Any) -> Any:
        """The wrapper whose turn it is, once it has planned."""
        turn, self._turn = self._turn, (self._turn + 1) % _TURNS
        if (copied := self._copied[turn]) is not None:
            copied.synchronize()
        self._wrappers[turn].plan(*arguments, **options)
        copied = self._copied[turn] = torch.cuda.Event()
        copied.record()
        return self._wrappers[turn]


@dataclass
class _GraphWrapper:
    """A wrapper whose buffers a CUDA graph reads, and where they may have pages."""

    wrapper: Any
    batch: int
    page_size: int
    pinned: list[Tensor]
    turn: int = 0


class FlashInferAttention(AttentionKind):
    """FlashInfer's paged and ragged kernels (its backend fa2) in bf16 on one GPU."""

    name = f"flashinfer {VERSION}"
    is_invariant = False

    def __init__(self, heads: Heads, device: torch.device) -> None:
        """See require_usable."""
        super().__init__(heads, device)
        self.require_usable(device.type)
        self._workspace: Tensor | None = None
        self._paged: _Turns | None = None
        self._ragged: _Turns | None = None

    @classmethod
    def require_usable(cls, device_type: str) -> None:
        """Raise ValueError unless it is a GPU, and flashinfer-python is there as it is pinned."""
        if device_type != "cuda":
            raise ValueError(
                "numerics.attention is 'flashinfer', whose kernels are for GPUs, and the device is "
                f"'{device_type}'; use canonical"
            )
        try:
            found = importlib.metadata.version("flashinfer-python")
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != VERSION:
            raise ValueError(
                f"numerics.attention is 'flashinfer', which needs flashinfer-python {VERSION}; it "
                f"is {found}: pip install 'samebit[flashinfer]'"
            )

    def plan_step(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_table: Tensor,
        page_size: int,
    ) -> AttentionPlan:
        """See AttentionKind."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if self._paged is None:
            self._paged = _Turns(
                lambda: BatchPrefillWithPagedKVCacheWrapper(self._buffer(), backend="fa2")
            )
        lens = np.asarray(context_lens)
        indptr, indices, last = _pages(lens, page_table.numpy(), page_size)
        wrapper = self._paged.plan(
            _ends(query_lens), indptr, indices, last, *self._sizes(), page_size, **self._options()
        )
        return FlashInferPlan(wrapper)

    def plan_context(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        key_starts: Sequence[int],
        num_keys: int,
    ) -> AttentionPlan:
        """See AttentionKind."""
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        from samebit.kernels.gpu.attention import plan

        if self._ragged is None:
            self._ragged = _Turns(
                lambda: BatchPrefillWithRaggedKVCacheWrapper(self._buffer(), backend="fa2")
            )
        packed = plan(query_lens, context_lens, None, 1, self.device, key_starts, num_keys)
        wrapper = self._ragged.plan(
            _ends(query_lens), _ends(context_lens), *self._sizes(), **self._options()
        )
        return FlashInferPlan(wrapper, packed)

    def plan_graph(self, entries: GraphEntries, max_own: int | None = None) -> AttentionPlan:
        """See AttentionKind: a wrapper with buffers of its own, planned for the longest."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        batch, pages = len(entries.table_rows), -(-entries.max_context // entries.page_size)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._buffer(),
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.zeros(batch + 1, **ints),
            paged_kv_indices_buffer=torch.zeros(batch * pages, **ints),
            paged_kv_last_page_len_buffer=torch.ones(batch, **ints),
            backend="fa2",
        )
        shape = wrapper._pin_memory_int_workspace_buffer.shape
        pinned = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_TURNS)]
        made = _GraphWrapper(wrapper, batch, entries.page_size, pinned)
        self._plan_graph(made, np.full(batch, entries.max_context), np.zeros((batch, pages), int))
        return FlashInferPlan(made)

    def prepare_replay(
        self,
        plan: AttentionPlan,
        context_lens: np.ndarray,
        table_rows: np.ndarray,
        page_table: np.ndarray,
        shared: SharedPrefixes | None,
    ) -> None:
        """Plan the graph's wrapper anew. What only fills the batch up has one page, of one key."""
        assert isinstance(plan, FlashInferPlan)
        missing = plan.wrapper.batch - len(context_lens)
        lens = np.concatenate([context_lens, np.ones(missing, dtype=context_lens.dtype)])
        rows = np.concatenate([table_rows, np.zeros(missing, dtype=table_rows.dtype)])
        self._plan_graph(plan.wrapper, lens, page_table[rows])

    def attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """See AttentionKind."""
        assert isinstance(plan, FlashInferPlan)
        wrapper = plan.wrapper
        if isinstance(wrapper, _GraphWrapper):
            wrapper = wrapper.wrapper
        return wrapper.run(q.contiguous(), (key_cache, value_cache))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """See AttentionKind."""
        return _PackedFlashInfer.apply(q, k, v, plan, self.heads.scale)

    def _plan_graph(self, made: _GraphWrapper, lens: np.ndarray, tables: np.ndarray) -> None:
        made.turn = (made.turn + 1) % _TURNS
        made.wrapper._pin_memory_int_workspace_buffer = made.pinned[made.turn]
        pages = _pages(lens, tables, made.page_size)
        options = self._options()
        del options["causal"]  # one query sees all keys
        made.wrapper.plan(*pages, *self._sizes(), made.page_size, **options)

    def _buffer(self) -> Tensor:
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        return self._workspace

    def _sizes(self) -> tuple[int, int, int]:
        return self.heads.num_heads, self.heads.num_kv_heads, self.heads.head_dim

    def _options(self) -> dict[str, Any]:
        bf16 = torch.bfloat16
        scale = self.heads.scale
        return {"causal": True, "sm_scale": scale, "q_data_type": bf16, "kv_data_type": bf16}


class _PackedFlashInfer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: FlashInferPlan, scale: float
    ) -> Tensor:
        spread = plan.packed.spread_keys
        keys, values = (x if spread is None else x[spread.rows] for x in (k, v))
        operands = (x.contiguous() for x in (q, keys, values))
        output, lse = plan.wrapper.run(*operands, return_lse=True)
        lse = (lse * math.log(2)).t().contiguous()  # FlashInfer's is of base 2, [T, Hq]
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.plan, ctx.scale = plan.packed, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        return *attend_backward(grad, q, k, v, output, lse, ctx.plan, ctx.scale), None, None


def _ends(lens: Sequence[int] | np.ndarray) -> Tensor:
    """[B + 1] int32: where each of B parts begins, and the end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lens)]).astype(np.int32))


def _pages(
    context_lens: np.ndarray, tables: np.ndarray, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr [B + 1], page ids, keys on each last page [B]), int32, of rows of a page table."""
    counts = -(-context_lens // page_size)
    taken = np.arange(int(counts.max(initial=1))) < counts[:, None]
    indices = tables[:, : taken.shape[1]][taken]
    last = context_lens - (counts - 1) * page_size
    ids, lens = (torch.from_numpy(x.astype(np.int32)) for x in (indices, last))
    return _ends(counts), ids, lens
