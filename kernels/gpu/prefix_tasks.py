"""PrefixTasks: what decode entries share, on the device, for the kernel that reads it once."""

import numpy as np
import torch
import triton

from samebit.kernels.attention_kind import Heads
from samebit.kernels.contract import GPU_KV_TILE
from samebit.kernels.shared_prefixes import SharedPrefixes, find_shared_prefixes


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
        tables, context_lens - query_lens, page_size, GPU_KV_TILE, capacity
    )
    if shared is None:
        return None
    tile_bytes = GPU_KV_TILE * heads.num_kv_heads * heads.head_dim * 2 * torch.bfloat16.itemsize
    return shared if shared.num_spared * tile_bytes >= least_bytes else None


class PrefixTasks:
    """SharedPrefixes as one block of int32 on the device: a graph's replays find the newest."""

    def __init__(
        self, num_tasks: int, num_entries: int, capacity: int, longest: int, device: torch.device
    ) -> None:
        """Room for so many tasks and entries, which share at most `longest` tokens."""
        self.longest = longest
        self._written: SharedPrefixes | None = None
        self._shape = (num_tasks, capacity)
        size = num_tasks * (capacity + 1) + num_entries
        self._block = torch.zeros(size, dtype=torch.int32, device=device)
        sizes = (num_tasks * capacity, num_tasks, num_entries)
        members, self.lens, self.of_entry = self._block.split(sizes)
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
        tasks, capacity = self._shape
        members = np.full((tasks, capacity), -1, dtype=np.int32)
        lens, of_entry = np.zeros(tasks, np.int32), np.zeros(len(self.of_entry), np.int32)
        members[: len(shared.members)] = shared.members
        lens[: len(shared.lens)] = shared.lens
        of_entry[: len(shared.of_entry)] = shared.of_entry
        block = torch.from_numpy(np.concatenate([members.ravel(), lens, of_entry]))
        if self._block.device.type == "cuda":
            block = block.pin_memory()
        self._block.copy_(block, non_blocking=True)
