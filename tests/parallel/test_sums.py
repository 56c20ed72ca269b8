"""Sums, gathers and errors of three ranks: in rank order, rounded once, told to everybody."""

import json

import pytest
import torch

from samebit.kernels.reduce import (
    ALONE,
    gather_columns,
    own_rows,
    sum_over_ranks,
)
from samebit.trainer.ranks import is_first, on_first, place, together
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import plain
from samebit.weight_sync.meeting import host_store, loopback_listener
from samebit.weight_sync.objects import gather_objects, smallest


@pytest.fixture(scope="module")
def found(run_together, tmp_path_factory):
    """What each of three ranks has found out."""
    folder = tmp_path_factory.mktemp("sums")
    calls = [(rank, 3, folder / "store", folder / "out.json") for rank in range(3)]
    run_together("rank_sums.agree", calls)
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(3)]


def test_sums_are_in_rank_order_and_rounded_once(found):
    """1 is lost beside 2^25 and kept behind -2^25; in bf16 two halves of an ulp make a whole."""
    for rank, own in enumerate(found):
        assert own["sum"] == [0.0, 0.0]
        assert own["linear"] == [[0.0, 0.0]]
        assert own["rounded once"] == 1.0078125
        # rows of rank r: arange + 10 r; their sum is 3 * arange + 30.
        assert own["own rows of sum"] == [[30.0 + 6 * rank, 33.0 + 6 * rank]]


def test_gathers_are_in_rank_order(found):
    for rank, own in enumerate(found):
        assert own["place"] == [rank, 3, rank == 0]
        assert own["objects"] == [
            {"rank": r, "long": "x" * 1000 * r, "values": [0.1] * r} for r in range(3)
        ]
        assert own["smallest"] == [0, 3]
        assert own["columns"] == [[0.0, 1.0, 10.0, 11.0, 20.0, 21.0]]
        assert own["rows"] == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
        assert own["own"] == [2 * rank, 2 * rank + 1]
        assert own["embedding"] == [[11.0, 12.0], [1.0, 2.0], [7.0, 8.0]]


def test_a_digest_of_shards_is_that_of_the_whole(found):
    whole = torch.tensor([[1.5, -2.0]]) * torch.tensor([[1.0], [2.0], [3.0]])
    digest = weights_digest([plain("w", "w", (3, 2))], {"w": whole})
    for own in found:
        assert own["digest"] == digest == f"{own['digest sums']:016x}"


def test_an_error_is_everybodys(found):
    """The rank itself raises its own; the others the first rank's that failed."""
    own = ["OSError", "full 1"]
    told = ["Told", "rank 1: full 1"]
    assert [each["no failure"] for each in found] == [None] * 3
    assert [each["one fails"] for each in found] == [told, own, told]
    assert [each["two fail"] for each in found] == [told, own, ["OSError", "full 2"]]
    assert [each["one fails, one crashes"] for each in found] == [told, own, told]


def test_the_first_works_for_all(found):
    """Once; its result or its error is everybody's."""
    result = {"from": 0, "seen": [1.5, None, "é"]}
    assert [each["first"] for each in found] == [[result, [0]], [result, []], [result, []]]
    told = ["CrashError", "rank 0: 'gone'"]
    assert [each["first fails"] for each in found] == [
        [["KeyError", "'gone'"], [0]],
        [told, []],
        [told, []],
    ]


def test_alone_there_is_nobody_to_ask():
    """One process outside torch.distributed, as in a notebook."""
    x = torch.arange(4.0).view(2, 2)
    assert gather_objects(object) == [object]
    assert smallest(7, None) == 7
    assert sum_over_ranks(x, ALONE, torch.bfloat16).dtype is torch.bfloat16
    assert gather_columns(x, ALONE) is x
    assert torch.equal(own_rows(x, ALONE), x)
    assert on_first(lambda: place(), RuntimeError) == (0, 1)
    assert is_first()
    with pytest.raises(KeyError), together(RuntimeError):
        raise KeyError("own")


def test_the_program_that_times_sums_checks_them(run_together, tmp_path):
    """Of two ranks: bits in rank order and by the tree, of all rows and of a rank's own."""
    out, store = tmp_path / "sums.json", host_store(loopback_listener())
    options = (str(out), "device=cpu", "most_kib=16", "repeats=1")
    calls = [(str(rank), "2", str(store.port), "peer_sums", *options) for rank in range(2)]
    run_together("launched", calls)
    one, two = json.loads(out.read_text())["sums"]
    assert (one["rows"], two["rows"], two["bytes"]) == (1, 2, 2 * 4096 * 2)
    assert one["us"].keys() == {"sum", "tree", "all_reduce"}
    assert two["us"].keys() == {"sum", "tree", "own rows", "all_reduce"}
    assert one["wrong"] == two["wrong"] == []
