"""Prompts that share full pages: who comes later waits for what an earlier one computes."""

from contextlib import suppress

import pytest
from counting import VERSION, World


@pytest.mark.parametrize("depth", [0, 1])
def test_samples_asked_for_one_by_one_share_one_prefill(depth):
    """Later arrivals wait for full pages that an earlier one computes; others pass them."""
    world = World(cached=True, depth=depth)
    prompts = ([1] * 9, [1] * 9, [1] * 6, [2] * 3, [1] * 4)
    seqs = [world.add(prompt, max_new=3)[0] for prompt in prompts]
    assert world.step() == [(0, 9, []), (3, 3, []), (4, 4, [])]
    while not seqs[2].pages:
        planned = world.step()
    assert [row for row in planned if row[0] in (1, 2)] == [(1, 1, []), (2, 2, [])]
    assert seqs[1].pages[:2] == seqs[0].pages[:2]
    assert seqs[2].pages[0] == seqs[0].pages[0]
    world.run()
    assert [s.num_new_tokens for s in seqs] == [3] * 5


def test_nobody_waits_for_more_than_it_shares():
    """A page is found as soon as its chunk is computed."""
    world = World(cached=True, prefill_chunk=4)
    world.add([1] * 12, max_new=1)
    world.add([1] * 4 + [2] * 4, max_new=1)
    assert world.run() == [[(0, 4, [])], [(0, 4, []), (1, 4, [])], [(0, 4, [])]]


@pytest.mark.parametrize("how", ["abort", "retract", "fail"])
def test_who_waits_goes_on_without_the_other(how):
    """Its pages never come: the next in order computes them."""
    world = World(cached=True, prefill_chunk=4)
    world.add([1] * 9, max_new=1)
    waiting = world.add([1] * 9, max_new=1)[0]
    world.runner.fails = how == "fail"
    with suppress(RuntimeError):
        world.step()
    if how == "abort":
        world.abort("0")
    elif how == "retract":
        world.scheduler.retract_all()
        world.prefixes.reset(VERSION)
    world.run()
    assert waiting.num_new_tokens == 1
    assert not world.scheduler.has_unfinished


def test_who_takes_nothing_from_the_cache_waits_for_nobody():
    world = World(cached=True)
    world.add([1] * 9, max_new=1)
    world.add([1] * 9, score=True)
    assert world.step() == [(0, 9, []), (1, 8, [])]


def test_nobody_waits_for_a_score():
    """Its pages do not go into the cache."""
    world = World(cached=True)
    world.add([1] * 9, score=True)
    world.add([1] * 9, max_new=1)
    assert world.step() == [(0, 8, []), (1, 9, [])]
