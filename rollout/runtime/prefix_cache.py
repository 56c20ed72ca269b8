"""Radix prefix cache: full pages of earlier contexts, found again by their tokens.

A tree whose edges are pages of tokens, for one weight version at a time: with another version it
starts anew, so keys and values of other weights can never be found. The tree holds one reference
to each of its pages; a page that nobody else refers to may be evicted, the least recently used
first. Whoever uses a page touches those before it, so a leaf comes before its ancestors.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from samebit.rollout.runtime.kv_cache import PagePool
from samebit.weight_sync.types import WeightVersion


class _Node:
    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, key: tuple[int, ...], page: int, parent: "_Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
    """Pages by token prefix, for the current weight version."""

    def __init__(self, pool: PagePool, page_size: int, version: WeightVersion) -> None:
        self._pool = pool
        self._page_size = page_size
        self.num_hit_tokens = 0
        self._start(version)

    def _start(self, version: WeightVersion) -> None:
        self.version = version
        self._root = _Node((), -1, None)
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # least recently used first
        self._in_use_at: int | None = None  # pool.num_drops when nothing could be evicted

    def reset(self, version: WeightVersion) -> None:
        """Drop every page and start anew under `version`."""
        for node in self._nodes:
            self._pool.drop(node.page)
        self._start(version)

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix, each with a reference for the caller.

        At least one token of token_ids is left out, because its logits are still needed.
        """
        node, path = self._root, []
        for key in self._page_keys(token_ids, (len(token_ids) - 1) // self._page_size):
            child = node.children.get(key)
            if child is None:
                break
            self._pool.share(child.page)
            path.append(child)
            node = child
        self._touch(path)
        self.num_hit_tokens += len(path) * self._page_size
        return [node.page for node in path]

    def insert(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Remember the full pages of a context whose keys and values are computed.

        A prefix that is already known keeps its own pages.
        """
        node, path = self._root, []
        num_full = len(token_ids) // self._page_size
        for key, page in zip(self._page_keys(token_ids, num_full), pages, strict=False):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(key, page, node)
                self._pool.share(page)
            path.append(child)
            node = child
        self._touch(path)
        self._in_use_at = None

    def evict(self, num_pages: int) -> int:
        """Free up to num_pages pages, least recently used first; how many it freed."""
        if self._in_use_at == self._pool.num_drops:
            return 0  # nothing has been let go since the last look
        freed = kept = 0
        while freed < num_pages and kept < len(self._nodes):
            node = next(iter(self._nodes))
            if node.children or self._pool.references(node.page) > 1:
                self._nodes.move_to_end(node)  # in use, or before one that is
                kept += 1
                continue
            assert node.parent is not None
            del node.parent.children[node.key]
            del self._nodes[node]
            self._pool.drop(node.page)
            freed, kept = freed + 1, 0  # what stood before it may be free now
        if freed < num_pages:
            self._in_use_at = self._pool.num_drops
        return freed

    def _touch(self, path: Sequence[_Node]) -> None:
        """Most recently used, a parent after its children."""
        for node in reversed(path):
            self._nodes[node] = None
            self._nodes.move_to_end(node)

    def _page_keys(self, token_ids: Sequence[int], num_pages: int) -> Iterator[tuple[int, ...]]:
        size = self._page_size
        return (tuple(token_ids[i * size : (i + 1) * size]) for i in range(num_pages))
