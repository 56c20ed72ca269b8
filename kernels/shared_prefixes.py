"""Which decode entries share how much of their contexts, so that it is read once for all of them.

Pure planning, on the host: page tables in, groups of entries out. An entry is in one group at most;
of nested prefixes those are chosen that spare the most.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class SharedPrefixes:
    """Tasks for a decode step: each reads the tiles that its members share, the longest first."""

    members: np.ndarray
    """[tasks, capacity] int32: two entries or more; -1 where a task has fewer."""
    lens: np.ndarray
    """[tasks] int32: tokens that they share, whole tiles."""
    of_entry: np.ndarray
    """[B] int32: tokens of each entry that a task reads for it."""
    num_spared: int
    """Tiles that need not be read."""
    split: int
    """Tokens of a split: what an entry reads for itself is counted from a split's start."""

    def longest_own(self, context_lens: np.ndarray) -> int:
        """Most tokens from the split in which an entry begins to read to its end.

        context_lens [B]: as they are now, longer than those that the groups were found for.
        """
        return int((context_lens - self.of_entry // self.split * self.split).max())


class _Group(NamedTuple):
    """Entries, by their places in the order of page tables, and the tiles that all share."""

    num_tiles: int
    places: list[int]

    def spared(self, capacity: int) -> int:
        num = len(self.places)
        return self.num_tiles * (num - -(-num // capacity))


def find_shared_prefixes(
    tables: np.ndarray,
    first_queries: np.ndarray,
    page_size: int,
    tile: int,
    split: int,
    capacity: int,
) -> SharedPrefixes | None:
    """Find what entries share, up to `capacity` of them in a task; None: nothing.

    tables [B, pages] int32: page ids in order of position, equal where pages are shared.
    first_queries [B]: position of each entry's first query; what lies before it can be shared.
    tile, split: tokens of each; a split is whole tiles.
    """
    limits = np.asarray(first_queries) // tile
    num_pages = min(-(-int(limits.max(initial=0)) * tile // page_size), tables.shape[1])
    if len(tables) < 2 or num_pages == 0:
        return None
    own = np.arange(num_pages) * page_size < limits[:, None] * tile
    keys = np.where(own, tables[:, :num_pages], -1).astype(np.int32)
    order = np.argsort(keys.view(f"V{4 * num_pages}").ravel(), kind="stable")
    keys, limits = keys[order], limits[order]
    differs = keys[1:] != keys[:-1]
    alike = np.where(differs.any(1), differs.argmax(1), num_pages)
    shared = np.minimum(alike * page_size // tile, np.minimum(limits[1:], limits[:-1]))
    groups = best_groups(shared.tolist(), capacity)
    if not groups:
        return None
    of_entry = np.zeros(len(tables), dtype=np.int32)
    tasks: list[tuple[int, np.ndarray]] = []
    for num_tiles, places in groups:
        entries = np.sort(order[places])
        for part in np.array_split(entries, -(-len(entries) // capacity)):
            if len(part) > 1:
                of_entry[part] = num_tiles * tile
                tasks.append((num_tiles * tile, part))
    tasks.sort(key=lambda task: -task[0])
    members = np.full((len(tasks), capacity), -1, dtype=np.int32)
    for row, (_, part) in zip(members, tasks, strict=True):
        row[: len(part)] = part
    return SharedPrefixes(
        members=members,
        lens=np.array([num_tokens for num_tokens, _ in tasks], dtype=np.int32),
        of_entry=of_entry,
        num_spared=sum(num_tokens // tile * (len(part) - 1) for num_tokens, part in tasks),
        split=split,
    )


def best_groups(shared: list[int], capacity: int) -> list[_Group]:
    """Disjoint groups that spare many tiles: the most there are, as long as one task holds each.

    shared [B - 1]: tiles that each of B entries shares with the next. Entries that share equally
    much are nodes of a tree, which is closed from its leaves: those of a node that no deeper group
    keeps share the node's tiles, and a deeper group that spares less by itself joins them.
    """
    chosen: list[_Group] = []
    open_nodes: list[tuple[int, list[int], list[_Group]]] = []  # tiles, places, deeper groups
    for place, num_tiles in enumerate([*shared, 0]):
        loose, groups = [place], list[_Group]()
        while open_nodes and open_nodes[-1][0] > num_tiles:
            depth, others, deeper = open_nodes.pop()
            loose, groups = _close(depth, others + loose, deeper + groups, capacity)
        if num_tiles == 0:
            chosen += groups
        elif open_nodes and open_nodes[-1][0] == num_tiles:
            open_nodes[-1][1].extend(loose)
            open_nodes[-1][2].extend(groups)
        else:
            open_nodes.append((num_tiles, loose, groups))
    return chosen


def _close(
    num_tiles: int, loose: list[int], deeper: list[_Group], capacity: int
) -> tuple[list[int], list[_Group]]:
    """Who is in no group at this node, and the groups of those below it."""

    def total(groups: list[_Group]) -> int:
        return sum(group.spared(capacity) for group in groups)

    kept = [g for g in deeper if g.spared(capacity) >= num_tiles * len(g.places)]
    joined = loose + [p for g in deeper if g not in kept for p in g.places]
    ways = [kept + [_Group(num_tiles, joined)], deeper + [_Group(num_tiles, loose)]]
    best = max(ways, key=total)
    rest = best.pop() if not best[-1].spared(capacity) else None
    return ([] if rest is None else rest.places), best
