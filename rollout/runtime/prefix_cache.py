"""Radix prefix cache: full pages of earlier contexts, found again by their tokens.

A tree whose edges are pages of tokens, for one weight version at a time: with another version it
starts anew, so keys and values of other weights can never be found. The tree holds one reference
to each of its pages; a leaf that nobody else refers to may be evicted, the least recently used
first.
"""

import itertools
from collections.abc import Iterator, Sequence

from samebit.rollout.runtime.kv_cache import PagePool
from samebit.weight_sync.types import WeightVersion


class _Node:
    __slots__ = ("children", "key", "last_used", "page", "parent")

    def __init__(self, key: tuple[int, ...], page: int, parent: "_Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self.last_used = 0


class PrefixCache:
    """Pages by token prefix, for the current weight version."""

    def __init__(self, pool: PagePool, page_size: int, version: WeightVersion) -> None:
        self._pool = pool
        self._page_size = page_size
        self._clock = itertools.count(1)
        self.version = version
        self._root = _Node((), -1, None)
        self.num_hit_tokens = 0

    def reset(self, version: WeightVersion) -> None:
        """Drop every page and start anew under `version`."""
        for node in list(self._nodes()):
            self._pool.drop(node.page)
        self.version = version
        self._root = _Node((), -1, None)

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix, each with a reference for the caller.

        At least one token of token_ids is left out, because its logits are still needed.
        """
        node, pages = self._root, []
        for key in self._page_keys(token_ids, (len(token_ids) - 1) // self._page_size):
            child = node.children.get(key)
            if child is None:
                break
            child.last_used = next(self._clock)
            self._pool.share(child.page)
            pages.append(child.page)
            node = child
        self.num_hit_tokens += len(pages) * self._page_size
        return pages

    def insert(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Remember the full pages of a context whose keys and values are computed.

        A prefix that is already known keeps its own pages.
        """
        node = self._root
        num_full = len(token_ids) // self._page_size
        for key, page in zip(self._page_keys(token_ids, num_full), pages, strict=False):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(key, page, node)
                self._pool.share(page)
            child.last_used = next(self._clock)
            node = child

    def evict(self, num_pages: int) -> int:
        """Free up to num_pages pages, least recently used leaves first; how many it freed."""
        freed = 0
        while freed < num_pages:
            leaves = [n for n in self._nodes() if not n.children and self._unused(n)]
            if not leaves:
                break
            leaves.sort(key=lambda n: n.last_used)
            for leaf in leaves[: num_pages - freed]:
                assert leaf.parent is not None
                del leaf.parent.children[leaf.key]
                self._pool.drop(leaf.page)
                freed += 1
        return freed

    def _unused(self, node: _Node) -> bool:
        return self._pool.references(node.page) == 1

    def _page_keys(self, token_ids: Sequence[int], num_pages: int) -> Iterator[tuple[int, ...]]:
        size = self._page_size
        return (tuple(token_ids[i * size : (i + 1) * size]) for i in range(num_pages))

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
