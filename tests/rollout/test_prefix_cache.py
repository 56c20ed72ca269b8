"""Pages are counted, found again by their tokens, and given up the least recently used first."""

import random

import pytest

from samebit.rollout.runtime.kv_cache import PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.weight_sync.types import WeightVersion

PAGE = 4
V0, V1 = WeightVersion(0, "a"), WeightVersion(1, "b")


@pytest.fixture
def pool():
    return PagePool(8)


@pytest.fixture
def cache(pool):
    return PrefixCache(pool, PAGE, V0)


def fill(pool, cache, tokens, known=0):
    """Compute `tokens` (after `known` shared pages), remember them, end; the pages used."""
    pages = cache.match(tokens)[:known] if known else []
    pages += [pool.take() for _ in range(-(-len(tokens) // PAGE) - len(pages))]
    cache.insert(tokens, pages)
    for page in pages:
        pool.drop(page)
    return pages


def test_pool_counts_references(pool):
    first, second = pool.take(), pool.take()
    assert first != second
    assert pool.num_free == 6
    pool.share(first)
    pool.drop(first)
    assert (pool.num_free, pool.references(first)) == (6, 1)
    pool.drop(first)
    assert (pool.num_free, pool.references(first)) == (7, 0)
    pool.drop(second)
    assert {pool.take() for _ in range(8)} == set(range(8))
    with pytest.raises(IndexError):
        pool.take()


def test_a_freed_page_cannot_be_used(pool):
    """Using a page after its end would hand one sequence another's keys."""
    page = pool.take()
    pool.drop(page)
    with pytest.raises(AssertionError):
        pool.drop(page)
    with pytest.raises(AssertionError):
        pool.share(page)


def test_full_pages_are_found_again(pool, cache):
    pages = fill(pool, cache, list(range(10)))  # two full pages and a part
    assert pool.num_free == 6
    found = cache.match([*range(10), 99])
    assert found == pages[:2]
    assert [pool.references(p) for p in found] == [2, 2]
    assert cache.num_hit_tokens == 8


def test_one_token_is_always_left_to_compute(pool, cache):
    pages = fill(pool, cache, list(range(8)))
    assert cache.match(list(range(8))) == pages[:1]
    assert cache.match(list(range(9))) == pages[:2]
    assert cache.match(list(range(4))) == []
    assert cache.match([0]) == []


def test_only_equal_prefixes_are_found(pool, cache):
    """A page's keys depend on all tokens before it, not on its own alone."""
    fill(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cache.match([9, 2, 3, 4, 5, 6, 7, 8, 0]) == []
    assert cache.match([5, 6, 7, 8, 0]) == []
    assert len(cache.match([1, 2, 3, 4, 5, 6, 7, 9, 0])) == 1


def test_branches_share_their_stem(pool, cache):
    stem = fill(pool, cache, [0, 1, 2, 3])
    left = fill(pool, cache, [0, 1, 2, 3, 4, 4, 4, 4], known=1)
    right = fill(pool, cache, [0, 1, 2, 3, 5, 5, 5, 5], known=1)
    assert left[0] == right[0] == stem[0]
    assert pool.num_free == 5
    assert cache.match([0, 1, 2, 3, 5, 5, 5, 5, 9]) == right


def test_a_known_prefix_keeps_its_pages(pool, cache):
    """Two sequences computed the same prompt: one copy stays, the other is freed."""
    first = fill(pool, cache, list(range(8)))
    fill(pool, cache, list(range(8)))
    assert pool.num_free == 6
    assert cache.match(list(range(9))) == first


def test_the_least_recently_used_leaf_goes_first(pool, cache):
    fill(pool, cache, [1] * 4)
    fill(pool, cache, [2] * 4)
    fill(pool, cache, [3] * 4)
    [used] = cache.match([1] * 5)
    pool.drop(used)
    assert cache.evict(1) == 1
    assert cache.match([2] * 5) == []
    assert cache.match([1] * 5) == [used]
    pool.drop(used)
    assert cache.evict(1) == 1
    assert cache.match([3] * 5) == []


def test_a_stem_outlives_its_branches(pool, cache):
    """An inner page that went first would make its children unreachable and leak them."""
    fill(pool, cache, list(range(12)))
    assert cache.evict(1) == 1
    found = cache.match(list(range(13)))
    assert len(found) == 2
    for page in found:
        pool.drop(page)
    assert cache.evict(5) == 2
    assert pool.num_free == 8


def test_whoever_ends_or_is_found_again_is_used(pool, cache):
    """insert and match both count as use, the stem's too."""
    fill(pool, cache, [1] * 4)
    fill(pool, cache, [2] * 8)
    fill(pool, cache, [1] * 4)
    assert cache.evict(1) == 1
    assert len(cache.match([2] * 9)) == 1
    assert len(cache.match([1] * 5)) == 1


def test_all_that_nobody_uses_can_be_evicted(pool, cache):
    """Also a stem that was looked at before its last branch; and again after nothing was found."""
    held = [*fill(pool, cache, [0] * 4), *fill(pool, cache, [0] * 4 + [1] * 4)[1:]]
    held = cache.match([0] * 4 + [1] * 4 + [9])
    fill(pool, cache, [5] * 4)
    fill(pool, cache, [0] * 4 + [2] * 4, known=1)
    assert cache.evict(1) == 1
    assert cache.evict(8) == 1  # the branch that nobody holds
    assert cache.evict(8) == 0
    for page in held:
        pool.drop(page)
    assert cache.evict(8) == 2
    assert pool.num_free == 8


def test_pages_in_use_are_not_evicted(pool, cache):
    fill(pool, cache, list(range(8)))
    held = cache.match(list(range(5)))
    assert cache.evict(8) == 1
    assert [pool.references(p) for p in held] == [2]
    assert cache.match(list(range(5))) == held


def test_a_new_version_finds_nothing(pool, cache):
    fill(pool, cache, list(range(8)))
    held = cache.match(list(range(9)))
    cache.reset(V1)
    assert cache.match(list(range(9))) == []
    assert pool.num_free == 6  # a running sequence keeps what it holds
    for page in held:
        pool.drop(page)
    assert pool.num_free == 8


def test_nothing_leaks_in_a_long_random_run():
    """Many sequences, matches, evictions and resets: the counts come out even."""
    rng = random.Random(0)
    pool = PagePool(30)
    cache = PrefixCache(pool, PAGE, V0)
    running = []
    for step in range(3000):
        choice = rng.random()
        if choice < 0.5:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
            pages = cache.match(tokens)
            need = -(-len(tokens) // PAGE) - len(pages)
            if need > pool.num_free:
                cache.evict(need - pool.num_free)
            if need > pool.num_free:
                for page in pages:
                    pool.drop(page)
                continue
            running.append((tokens, pages + [pool.take() for _ in range(need)]))
        elif choice < 0.99 and running:
            tokens, pages = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.8:
                cache.insert(tokens, pages)
            for page in pages:
                pool.drop(page)
        else:
            cache.reset(WeightVersion(step, "x"))
        in_use = {page for _, pages in running for page in pages}
        assert pool.num_free <= 30 - len(in_use)
    for _, pages in running:
        for page in pages:
            pool.drop(page)
    assert cache.num_hit_tokens > 0
    cache.reset(V1)
    assert pool.num_free == 30
