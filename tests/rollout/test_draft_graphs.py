"""What a draft's graph is told, in small: no graph runs here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samebit.rollout.runtime.batch import Layout, lay_out
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.graph_rows import graph_rows
from samebit.rollout.runtime.graphs import _Columns
from samebit.rollout.speculative.draft_graphs import Chains, DraftGraphs, _Told

PAGE = 64


@pytest.fixture
def slots():
    """Six slots with 20 pages each, all different."""
    return SimpleNamespace(
        page_size=PAGE,
        num_slots=6,
        pages=np.arange(120, dtype=np.int32).reshape(6, 20),
        temperature=np.full(6, 0.5, dtype=np.float32),
        seed=np.arange(6) + 100,
        sample_id=np.arange(6) + 200,
        greedy=np.array([0, 1, 0, 0, 0, 0], dtype=bool),
    )


def chains_of(slots, owners, lengths, unread, room):
    owners, lengths, unread, room = map(np.array, (owners, lengths, unread, room))
    layout: Layout = lay_out(owners, lengths - 1 - unread, unread, slots)
    return Chains(owners, lengths, room, layout, np.arange(unread.sum()) + 1000)


KEPT = 22


def graphs_of(slots, replays_alone=True):
    attention = SimpleNamespace(graph_queries=lambda *_: 8, replays_alone=replays_alone)
    passes, states = SimpleNamespace(attention=attention), torch.zeros(7, KEPT, 4)
    return DraftGraphs(passes, slots, states, None)


def test_rows_and_places(slots):
    """Two samples with three and one unread tokens, over the end of a page; two that fill up."""
    chains, graphs = chains_of(slots, [3, 1, 4], [66, 10, 30], [3, 1, 1], [2, 3, 0]), None
    graphs = graphs_of(slots)
    key = graphs._key(chains)
    assert (key.bucket, key.queries, key.guesses, key.pages) == (4, 4, 3, 16)
    told = _Told(key, torch.zeros(_Told.size(key), dtype=torch.int64))
    graphs._tell(told, chains, key)
    own, kept, token_ids, positions, kv_slots = told.rows.tolist()
    assert own == [3, 3, 3, 6, 1, 6, 6, 6, 4, 6, 6, 6, *[6] * 4]
    assert [kept[i] for i in (0, 1, 2, 4, 8)] == [62 % KEPT, 63 % KEPT, 64 % KEPT, 8, 28 % KEPT]
    assert [token_ids[i] for i in (0, 1, 2, 4, 8)] == [1000, 1001, 1002, 1003, 1004]
    assert [positions[i] for i in (0, 1, 2, 4, 8)] == [62, 63, 64, 8, 28]
    places = [60 * PAGE + 62, 60 * PAGE + 63, 61 * PAGE, 20 * PAGE + 8, 80 * PAGE + 28]
    assert [kv_slots[i] for i in (0, 1, 2, 4, 8)] == places
    assert kv_slots[3] == kv_slots[5] == kv_slots[-1] == -1
    context, query_lens, last, bits, seeds, lengths, ids, greedy = told.samples.tolist()
    assert context == [65, 9, 29, 0]
    assert query_lens == [3, 1, 1, 0]
    assert last == [2, 4, 8, 0]
    assert np.array(bits, dtype=np.int32).view(np.float32).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert (seeds, ids) == ([103, 101, 104, 0], [203, 201, 204, 0])
    assert (lengths, greedy) == ([66, 10, 30, 0], [0, 1, 0, 0])
    first, second = told.later.tolist()  # each: positions, places, contexts
    assert first == [[65, 9, 0, 0], [61 * PAGE + 1, 20 * PAGE + 9, -1, -1], [66, 10, 0, 0]]
    assert second == [[0, 10, 0, 0], [-1, 20 * PAGE + 10, -1, -1], [0, 11, 0, 0]]
    assert told.table[:3].tolist() == slots.pages[[3, 1, 4], :16].tolist()


@pytest.mark.parametrize("length", range(1018, 1027))
def test_samples_without_room_at_a_bound(slots, length):
    """Their next places may lie behind the pages that the graph knows."""
    graphs = graphs_of(slots)
    chains = chains_of(slots, [0, 1], [length, 900], [1, 2], [0, 5])
    key = graphs._key(chains)
    told = _Told(key, torch.full((_Told.size(key),), 7))
    graphs._tell(told, chains, key)
    assert told.later[:, 1, 0].tolist() == [-1] * 4
    assert (told.later[:, 1, 1] >= 0).all()


def test_what_fits(slots):
    """A kind whose plans are the host's cannot go on by itself; nobody guesses: a graph that reads
    alone."""
    chains = chains_of(slots, [0], [40], [1], [0])
    assert graphs_of(slots).fits(chains)
    for room in range(6):
        assert graphs_of(slots)._key(chains_of(slots, [0], [40], [1], [room])).guesses == room
    assert not graphs_of(slots, replays_alone=False).fits(chains)
    assert not graphs_of(slots).fits(chains_of(slots, [0], [40], [9], [0]))


def test_columns_of_a_step_with_guesses():
    """A sample's rows lie behind one another, as many for each as the most that one needs."""
    drafts = Drafts(np.array([2, 0, 1]), np.array([5, 6, 7]))
    columns = _Columns.of(3, drafts)
    assert columns.queries == 4
    assert columns.places.tolist() == [0, 1, 2, 4, 8, 9]
    assert columns.places[drafts.rows].tolist() == [1, 2, 9]
    assert _Columns.of(3, None).places.tolist() == [0, 1, 2]
    for most, queries in ((1, 2), (3, 4), (4, 8), (7, 8)):
        one = Drafts(np.array([most]), np.zeros(most, dtype=np.int64))
        assert _Columns.of(1, one).queries == queries


@pytest.mark.parametrize(
    ("num_samples", "most", "rows"),
    [(1, 0, 1), (64, 0, 64), (64, 1, 128), (64, 3, 256), (65, 4, 80 * 8), (129, 7, None)],
)
def test_rows_of_a_graph(num_samples, most, rows):
    """One sample's guesses pad all of the batch."""
    assert graph_rows(num_samples, most) == rows
    assert graph_rows(1025, most) is None


def test_drafts_are_cut_behind_so_many_of_each():
    drafts = Drafts(np.array([2, 0, 3, 1]), np.array([5, 6, 7, 8, 9, 4]))
    for most, ids in ((0, []), (1, [5, 7, 4]), (2, [5, 6, 7, 8, 4]), (3, [5, 6, 7, 8, 9, 4])):
        found = drafts.cut(most)
        assert found.token_ids.tolist() == ids
        assert found.lens.tolist() == np.minimum([2, 0, 3, 1], most).tolist()
