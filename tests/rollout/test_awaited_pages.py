"""Prompts that share full pages: who comes later waits for what an earlier one computes."""

import itertools
from contextlib import suppress
from dataclasses import replace

import pytest
from counting import VERSION, World

from samebit.rollout.runtime.awaited_pages import AwaitedPages
from samebit.rollout.runtime.prefix_cache import PrefixCache


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
    """Its pages never come, or later: who waited computes them, or waits for them again."""
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
    """Its pages go into the cache when it has ended, and not before."""
    world = World(cached=True)
    world.add([1] * 9, score=True)
    world.add([1] * 9, max_new=1)
    assert world.step() == [(0, 8, []), (1, 9, [])]


def test_nobody_waits_for_hidden_states():
    """Such a request computes what the cache has, too, which others need not wait for."""
    world = World(cached=True, prefill_chunk=4)
    world.add([1] * 9, max_new=1)
    world.run()
    [every_position] = world.add([1] * 9, max_new=1)
    every_position.request = replace(every_position.request, hidden_state_layers=(1,))
    every_position.add_hidden = lambda collected, rows: None
    world.add([1] * 9, max_new=1)
    assert world.step() == [(1, 4, []), (2, 1, [])]


@pytest.mark.parametrize("where", ["has_to_wait", "match"])
def test_who_waits_outlives_an_interrupt(where, monkeypatch):
    """Whatever leaves the planning in its midst, nobody is lost."""
    world = World(cached=True)
    seqs = [world.add([1] * 9, max_new=2)[0] for _ in range(6)]
    owner = {"has_to_wait": AwaitedPages, "match": PrefixCache}[where]
    original, calls = getattr(owner, where), itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == (4 if where == "has_to_wait" else 3):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.run()
    assert [s.num_new_tokens for s in seqs] == [2] * 6


def test_a_long_queue_is_not_looked_through():
    """Behind so many that wait nobody is let in."""
    world = World(cached=True, num_pages=64, max_num_seqs=4, max_batch_tokens=64)
    for _ in range(270):
        world.add([1] * 9, max_new=1)
    world.add([2] * 3, max_new=1)
    assert world.step() == [(0, 9, [])]
    assert world.step()[:2] == [(1, 1, []), (2, 1, [])]


def test_pages_of_a_failed_step_are_not_found():
    """What the cache has may be why it failed."""
    world = World(cached=True, prefill_chunk=4)
    seqs = world.add([1] * 9, max_new=1)
    world.step()
    world.runner.fails = True
    with pytest.raises(RuntimeError):
        world.step()
    assert world.run() == [[(0, 4, [])], [(0, 4, [])], [(0, 1, [])]]
    assert seqs[0].num_new_tokens == 1
