"""PrefixTasks: what decode entries share, on the device, for the kernel that reads it once."""

import numpy as np
import torch
import triton

from samebit.kernels.attention_kind import Heads
from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.shared_prefixes import SharedPrefixes, find_shared_prefixes

_ALIGNED = 4  # numbers: kernels are compiled for addresses that are multiples of 16 bytes


def task_rows(entry_rows: int) -> int:
    """Query rows of a task whose members have so many each (queries x heads of a KV head)."""
    return 64 if entry_rows <= 16 else 128


def task_capacity(entry_rows: int) -> int:
    """Entries that one task serves; fewer than two: nothing can be shared."""
    return task_rows(entry_rows) // entry_rows


def find_prefixes(
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    tables: np.ndarray,
    page_size: int,
    heads: Heads,
    least_bytes: int,
) -> SharedPrefixes | None:
    """See find_shared_prefixes; None too if a layer reads less than least_bytes less by it.

    query_lens and context_lens [B]; tables [B, pages], the entries' rows of the page table.
    """
    capacity = task_capacity(heads.per_kv * triton.next_power_of_2(int(query_lens.max())))
    if capacity < 2:
        return None
    shared = find_shared_prefixes(
        tables, context_lens - query_lens, page_size, GPU_KV_TILE, GPU_KV_SPLIT, capacity
    )
    if shared is None:
        return None
    tile_bytes = GPU_KV_TILE * heads.num_kv_heads * heads.head_dim * 2 * torch.bfloat16.itemsize
    return shared if shared.num_spared * tile_bytes >= least_bytes else None


class PrefixTasks:
    """SharedPrefixes as one block of int32 on the device: a graph's replays find the newest.

    Its work items are (task, split): programs take them in turn, so that a graph has as many
    programs as the card can use, whatever there is to do.
    """

    def __init__(
        self, num_tasks: int, num_entries: int, capacity: int, longest: int, device: torch.device
    ) -> None:
        """Room for so many tasks and entries, which share at most `longest` tokens."""
        self.most_items = num_tasks * -(-longest // GPU_KV_SPLIT)
        self._written: SharedPrefixes | None = None
        self._shape = (num_tasks, capacity)
        sizes = (num_tasks * capacity, num_tasks, num_entries, 1, 2 * self.most_items)
        self._sizes = [size + -size % _ALIGNED for size in sizes]
        self._block = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        parts = zip(self._block.split(self._sizes), sizes, strict=True)
        members, self.lens, self.of_entry, self.num_items, self.items = (x[:n] for x, n in parts)
        self.members = members.view(self._shape)

    @classmethod
    def for_graph(
        cls, num_entries: int, capacity: int, longest: int, device: torch.device
    ) -> "PrefixTasks":
        """Room for whatever so many entries may share: a task has at least two of them."""
        return cls(num_entries // 2, num_entries, capacity, longest, device)

    @classmethod
    def of(cls, shared: SharedPrefixes, device: torch.device) -> "PrefixTasks":
        """One step's tasks."""
        longest, num_entries = int(shared.lens.max()), len(shared.of_entry)
        num_tasks, capacity = shared.members.shape
        made = cls(num_tasks, num_entries, capacity, longest, device)
        made.write(shared)
        return made

    def write(self, shared: SharedPrefixes) -> None:
        """Bring the device up to date once its stream gets there; it may hold fewer of each."""
        if shared is self._written:
            return
        self._written = shared
        members = np.full(self._shape, -1, dtype=np.int32)
        members[: len(shared.members)] = shared.members
        num_splits = -(-shared.lens // GPU_KV_SPLIT)
        tasks = np.repeat(np.arange(len(num_splits)), num_splits)
        first = np.cumsum(num_splits) - num_splits
        items = np.stack([tasks, np.arange(len(tasks)) - first[tasks]], axis=1)
        parts = (
            members.ravel(),
            shared.lens,
            shared.of_entry,
            np.array([len(items)]),
            items.ravel(),
        )
        filled = [_filled(part, size) for part, size in zip(parts, self._sizes, strict=True)]
        block = torch.from_numpy(np.concatenate(filled).astype(np.int32))
        if self._block.device.type == "cuda":
            block = block.pin_memory()
        self._block.copy_(block, non_blocking=True)


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """With zeros behind them."""
    return np.pad(values, (0, size - len(values)))
