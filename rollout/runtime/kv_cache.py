"""Paged KV cache: the pool that counts references to pages, and the tensors behind the pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samebit.kernels.memory import Arena
from samebit.kernels.transfer import to_device
from samebit.rollout.models.config import KVLayout


class PagePool:
    """Page ids with reference counts. A page is free when nobody refers to it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_drops = 0  # over its life
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page with one reference; IndexError if there is none."""
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a live page."""
        assert self._references[page] > 0, page
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """One reference less; the last one frees the page."""
        assert self._references[page] > 0, page
        self._references[page] -= 1
        self.num_drops += 1
        if self._references[page] == 0:
            self._free.append(page)

    def references(self, page: int) -> int:
        return self._references[page]

    def in_use(self) -> list[int]:
        """The pages that somebody refers to, in order."""
        return [page for page, count in enumerate(self._references) if count]


class KVCache:
    """Keys and values of every layer: caches [P, page_size, Hkv, Dh].

    Of several layouts the layers come one behind another.
    """

    def __init__(
        self,
        layouts: Sequence[KVLayout],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        arena: Arena,
    ) -> None:
        self.page_size = page_size
        shapes = [
            layout.cache_shape(num_pages, page_size)
            for layout in layouts
            for _ in range(layout.num_layers)
        ]
        kinds = ("key", "value")
        named = {f"{kind}.{i}": (x, dtype) for kind in kinds for i, x in enumerate(shapes)}
        made = [*arena.allocate("kv_cache", named).values()]
        self.keys, self.values = made[: len(shapes)], made[len(shapes) :]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer; no target is a source."""
        if not copies:
            return
        index = to_device(torch.tensor(copies), self.keys[0].device)
        for cache in (*self.keys, *self.values):
            cache.index_copy_(0, index[:, 1], cache[index[:, 0]])

    def read_pages(self, pages: Sequence[int]) -> list[Tensor]:
        """Copies in host memory of the pages in every layer, each [pages, page_size, Hkv, Dh]."""
        index = to_device(torch.tensor(pages), self.keys[0].device)
        return [cache[index].cpu() for cache in (*self.keys, *self.values)]

    def write_pages(self, pages: Sequence[int], contents: Sequence[Tensor]) -> None:
        """Put back what `read_pages` gave for the same pages."""
        index = to_device(torch.tensor(pages), self.keys[0].device)
        for cache, content in zip((*self.keys, *self.values), contents, strict=True):
            cache.index_copy_(0, index, content.to(cache.device))
