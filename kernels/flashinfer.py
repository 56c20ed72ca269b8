"""flashinfer: attention of engine and trainer by FlashInfer's kernels, a kind of its own.

FlashInfer divides contexts by the batch, and its tiles by the number of queries: the bits of a
sample depend on its neighbours, and decode's are not those of the training forward. `samebit
verify numerics.attention=flashinfer` says how far they agree. Gradients are those of the canonical
kind: torch's deterministic flash attention, fed with FlashInfer's output and log-sum-exps.

Source: Ye et al. 2025, arXiv 2501.01005.
"""

import importlib.metadata
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_HEAD_DIMS = (64, 128, 256)  # that its kernels are written for
_WORKSPACE_BYTES = 384 << 20  # for the parts of contexts that are cut up


@dataclass(frozen=True)
class FlashInferPlan(AttentionPlan):
    """A wrapper that has planned a batch, its own as long as the plan lives."""

    wrapper: Any
    packed: Any = None  # the canonical kind's plan of packed samples, by which gradients go
    graph_page_size: int | None = None  # of a CUDA graph's wrapper, which is planned again


class _Wrappers:
    """Wrappers that no plan has, each with the moment when its latest one was on the device."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._free: list[tuple[Any, torch.cuda.Event]] = []

    def plan(self, packed: Any, *arguments: Any, **options: Any) -> FlashInferPlan:
        """A plan by a wrapper that comes back when the plan is gone."""
        if self._free:
            wrapper, copied = self._free.pop(0)
            copied.synchronize()  # its host memory is written anew
        else:
            wrapper, copied = self._make(), torch.cuda.Event()
        with _told():
            wrapper.plan(*arguments, **options)
        copied.record()
        made = FlashInferPlan(wrapper, packed)
        weakref.finalize(made, self._free.append, (wrapper, copied))
        return made


class FlashInferAttention(AttentionKind):
    """FlashInfer's paged and ragged kernels (its backend fa2) in bf16 on one GPU."""

    name = f"flashinfer {VERSION}"
    is_invariant = False

    def __init__(self, heads: Heads, device: torch.device) -> None:
        """See require_usable."""
        super().__init__(heads, device)
        self.require_usable(device.type)
        if heads.head_dim not in _HEAD_DIMS:
            raise ValueError(
                f"numerics.attention is 'flashinfer', which has kernels for heads of {_HEAD_DIMS} "
                f"features; head_dim is {heads.head_dim}: use canonical"
            )
        self._workspace: Tensor | None = None
        self._paged: _Wrappers | None = None
        self._ragged: _Wrappers | None = None
        self._try()

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
            self._paged = _Wrappers(
                lambda: BatchPrefillWithPagedKVCacheWrapper(self._buffer(), backend="fa2")
            )
        lens = np.asarray(context_lens)
        indptr, indices, last = _pages(lens, page_table.numpy(), page_size)
        pages = indptr, indices, last
        return self._paged.plan(
            None, _ends(query_lens), *pages, *self._sizes(), page_size, **self._options()
        )

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
            self._ragged = _Wrappers(
                lambda: BatchPrefillWithRaggedKVCacheWrapper(self._buffer(), backend="fa2")
            )
        packed = plan(query_lens, context_lens, None, 1, self.device, key_starts, num_keys)
        ends = _ends(query_lens), _ends(context_lens)
        return self._ragged.plan(packed, *ends, *self._sizes(), **self._options())

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
        made = FlashInferPlan(wrapper, graph_page_size=entries.page_size)
        self._plan_graph(made, np.full(batch, entries.max_context), np.zeros((batch, pages), int))
        return made

    def prepare_replay(
        self,
        plan: AttentionPlan,
        context_lens: np.ndarray,
        table_rows: np.ndarray,
        page_table: np.ndarray,
        shared: SharedPrefixes | None,
    ) -> None:
        """Plan the graph's wrapper anew, once the step before has run: FlashInfer waits for it.

        What only fills the batch up reads one key of the first slot's first page.
        """
        assert isinstance(plan, FlashInferPlan)
        missing = len(plan.wrapper._paged_kv_last_page_len_buf) - len(context_lens)
        lens = np.concatenate([context_lens, np.ones(missing, dtype=context_lens.dtype)])
        rows = np.concatenate([table_rows, np.zeros(missing, dtype=table_rows.dtype)])
        self._plan_graph(plan, lens, page_table[rows])

    def attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """See AttentionKind."""
        assert isinstance(plan, FlashInferPlan)
        return plan.wrapper.run(q.contiguous(), (key_cache, value_cache))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """See AttentionKind."""
        return _PackedFlashInfer.apply(q, k, v, plan, self.heads.scale)

    def _plan_graph(self, plan: FlashInferPlan, lens: np.ndarray, tables: np.ndarray) -> None:
        page_size = plan.graph_page_size
        assert page_size is not None
        options = self._options()
        del options["causal"]  # one query sees all keys
        with _told():
            plan.wrapper.plan(
                *_pages(lens, tables, page_size), *self._sizes(), page_size, **options
            )

    def _try(self) -> None:
        """Compute one token, so that what cannot be compiled or computed is known at the start."""
        heads, page_size = self.heads, 16
        caches = torch.zeros(
            2, 1, page_size, heads.num_kv_heads, heads.head_dim,
            dtype=torch.bfloat16, device=self.device,
        )  # fmt: skip
        q = caches.new_zeros(1, heads.num_heads, heads.head_dim)
        with _told(f"heads of {heads.head_dim} on {torch.cuda.get_device_name(self.device)}"):
            plan = self.plan_step([1], [1], torch.zeros(1, 1, dtype=torch.int64), page_size)
            self.attend(q, caches[0], caches[1], plan)

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


@contextmanager
def _told(what: str = "a batch") -> Iterator[None]:
    """Say in our words what FlashInfer refuses."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"numerics.attention is 'flashinfer', which refuses {what}: {error}"
        ) from error


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
