"""The engine's books: every page, slot and sample has an owner, and at the end none has one.

The one place of the tests that reads the inside of scheduler, cache and pool.
"""

import weakref
from collections import Counter
from contextlib import suppress

from samebit.rollout.runtime.running_sample import Status
from samebit.rollout.runtime.sampler import NonFiniteError


def cached_prefixes(engine):
    """{page: the tokens up to its end} of the prefix cache."""
    found, cache = {}, engine.prefixes
    todo = [] if cache is None else [((), cache._root)]
    while todo:
        before, parent = todo.pop()
        for key, node in parent.children.items():
            assert (node.key, node.parent) == (key, parent)
            assert len(key) == engine.config.page_size
            assert node.page not in found, f"page {node.page} is cached twice"
            found[node.page] = (*before, *key)
            todo.append((found[node.page], node))
    if cache is not None:
        assert sorted(node.page for node in cache._nodes) == sorted(found), "lost branches"
    return found


def progress_of(engine, seq):
    """(tokens known, how many of them have keys and values) of a running sample."""
    slots = engine.scheduler._slots
    known = slots.tokens[seq.slot, len(seq.token_ids) : slots.known[seq.slot]].tolist()
    return [*seq.token_ids, *known], int(slots.computed[seq.slot])


def check_pages(engine, running):
    """References are owners; only full pages of equal tokens are shared."""
    size, pool, cached = engine.config.page_size, engine.pool, cached_prefixes(engine)
    tokens_of, references = dict(cached), Counter(cached.keys())
    for seq in running:
        tokens, computed = progress_of(engine, seq)
        assert len(set(seq.pages)) == len(seq.pages), "a page twice in one sequence"
        references.update(seq.pages)
        for i, page in enumerate(seq.pages):
            prefix = tuple(tokens[: (i + 1) * size])
            if pool.references(page) > 1:
                assert (i + 1) * size <= computed, f"page {page} is shared but not full"
                assert tokens_of.setdefault(page, prefix) == prefix, f"page {page}: other tokens"
    expected = [references[page] for page in range(pool.num_pages)]
    assert pool._references == expected, "references and owners differ"
    free = [page for page, count in enumerate(expected) if not count]
    assert sorted(pool._free) == free, "a page is lost, or free twice"


def check_slots(engine, running):
    """Who runs has one slot, which knows its pages."""
    slots = engine.scheduler._slots
    used = [slot for slot, seq in enumerate(slots.seqs) if seq is not None]
    assert sorted(used + slots._free) == list(range(slots.num_slots)), "a slot is lost"
    assert sorted(seq.slot for seq in running) == used
    assert set(slots.decode_order()) <= set(used)
    for seq in running:
        assert slots.seqs[seq.slot] is seq
        assert len(seq.token_ids) <= slots.known[seq.slot], "tokens in two places"
        assert slots.pages[seq.slot, : slots.num_pages[seq.slot]].tolist() == seq.pages


def live_samples(engine):
    """The samples of all requests that are not reported."""
    return [seq for request in engine.loop.book.live.values() for seq in request.samples]


def check_queues(engine, running):
    """Each unfinished sample waits, runs, or is to fork from one that does."""
    scheduler = engine.scheduler
    waiting, prefilling = list(scheduler._waiting), scheduler._prefilling
    live = live_samples(engine)
    coming = [seq for leader in (*waiting, *running) for seq in leader.siblings]
    forking = {
        id(seq) for f in engine.step_loop._flights for c in f.step.chunks for seq in c.siblings
    }
    places = Counter(map(id, (*waiting, *running, *coming)))
    assert set(places) <= set(map(id, live)), "somebody runs for nobody"
    for seq in live:
        expected = 0 if seq.finish_reason is not None else 1
        if seq.slot is not None or places[id(seq)] or id(seq) not in forking:
            assert places[id(seq)] == expected, "a sample is lost, or in two places"
        if seq.slot is None:
            assert not seq.pages, "pages of one that does not run"
        if seq.swapped:
            assert seq.is_mixed, "what can be computed anew is kept"
            assert seq.status is Status.WAITING, "keys and values in two places"
    expected = {id(seq): Status.WAITING for seq in waiting}
    expected |= {id(seq): Status.FORKING for seq in coming}
    expected |= {id(seq): Status.DECODING for seq in running}
    expected |= {id(seq): Status.PREFILLING for seq in prefilling}
    for seq in live:
        ended = seq.finish_reason is not None
        otherwise = Status.FINISHED if ended else Status.FORKING  # its first token is in flight
        assert seq.status is expected.get(id(seq), otherwise), "a status that is not true"
    for queue in (waiting, prefilling):
        arrivals = [seq.arrival for seq in queue]
        assert arrivals == sorted(arrivals), "a later arrival goes first"
    assert set(map(id, prefilling)) <= set(map(id, running))
    unfinished = {seq.request.request_id for seq in live if seq.finish_reason is None}
    late = {seq.request.request_id for seq in engine.step_loop._finished}
    assert unfinished <= set(engine.loop.book.live) <= unfinished | late, "not reported"
    assert scheduler.num_unfinished == len(unfinished)
    assert scheduler.has_unfinished == bool(unfinished)


def check_awaited(engine, running):
    """Pages are awaited of samples that run, and that have them to compute."""
    awaited, size = engine.scheduler._awaited, engine.config.page_size
    assert set(map(id, awaited._keys)) <= set(map(id, running)), "awaited of one that is gone"
    assert set(map(id, awaited._owners.values())) <= set(map(id, awaited._keys))
    for seq, key in awaited._keys.items():
        assert not seq.is_mixed
        assert len(seq.page_keys) <= len(seq.token_ids) // size
        assert key in seq.page_keys, "a page that it has not"
    for key, owner in awaited._owners.items():
        assert awaited._keys[owner] == key


def check_calls(engine):
    """Whoever waits, waits for something that is unfinished."""
    book = engine.loop.book
    waiting = {request.call for request in book.live.values()} - {None}
    assert set(book.calls) == waiting
    assert set(book._streams) <= waiting


def check_books(engine):
    """Between steps, whatever is under way."""
    running = [seq for seq in live_samples(engine) if seq.slot is not None]
    check_slots(engine, running)
    check_pages(engine, running)
    check_queues(engine, running)
    check_awaited(engine, running)
    check_calls(engine)


def settle(engine, leaves_requests=False):
    """Nobody may hold anything but the cache, and after flush_cache not even that.

    Requests that are unfinished are aborted first, so that the next test begins without them; they
    are an error unless the test says that it `leaves_requests`.
    """
    live = engine.loop.book.live
    left = list(live)
    for request_id in left:
        for _ in range(2):  # what was in flight may be NaN, or the end of it
            with suppress(KeyError, NonFiniteError):
                engine.abort_request(request_id)
    check_books(engine)
    assert not live
    assert not engine.step_loop._flights
    assert engine.scheduler.num_running == 0
    engine.flush_cache()
    check_books(engine)
    assert engine.pool.num_free == engine.pool.num_pages
    assert leaves_requests or not left, f"left unfinished: {left}; see the marker leaves_requests"


class Watch:
    """Looks at every engine that is made: when it goes, and after each test at those that stay."""

    def __init__(self):
        self.leaves_requests = False  # of the test that runs
        self._engines, self._wrong = weakref.WeakSet(), []

    def made(self, engine):
        """An engine whose __init__ is through."""
        engine._is_watched = True  # the cyclic collector clears weak references before __del__
        self._engines.add(engine)

    def going(self, engine):
        """Of __del__, from which nobody hears an error: `after_test` raises it."""
        try:
            if getattr(engine, "_is_watched", False):
                settle(engine, self.leaves_requests)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised elsewhere
            self._wrong.append(error)

    def after_test(self):
        """Raise the first thing that is wrong with an engine which the test made or used."""
        wrong, self._wrong = self._wrong, []
        for engine in list(self._engines):
            try:
                settle(engine, self.leaves_requests)
            except Exception as error:  # noqa: BLE001 - after all others were settled too
                wrong.append(error)
        if wrong:
            raise wrong[0]
