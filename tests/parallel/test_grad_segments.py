"""numerics.grad_segments: copies of the model may come and go, the weights are the same bits."""

import json
import math

import pytest
from rank_segments import STEPS

from samebit.recipes.models.tiny_model import make_random_model

LAYOUTS = (
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "tp_invariant": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {"context": 3},
)
SIZES = ("tensor", "pipeline", "context", "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied embeddings, of which the last stage of a pipeline holds a copy."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_model(folder, "qwen3", seed=3, tied=True, num_layers=4, std=0.05)
    return folder


@pytest.fixture
def run(run_ranks, folder, tmp_path):
    """run(name, layout, before, until): what all ranks found in each step, the loss that they then
    measured, and the numbers of each one's micro-batches; the checkpoint is in tmp_path / name."""

    def run(name, layout, before="nothing", until=STEPS):
        size = math.prod(layout.get(key, 1) for key in SIZES)
        places = tmp_path / before, tmp_path / name, until, tmp_path / f"{name}.json"
        run_ranks("rank_segments.go_on", size, folder, json.dumps(layout), *places)
        ranks = [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in range(size)]
        counts = [rank.pop("counts") for rank in ranks]
        assert all(rank == ranks[0] for rank in ranks)
        return ranks[0]["steps"], ranks[0]["nll"], counts

    return run


def test_copies_go_and_come_back(run):
    """Four, then two, then one, then four come step by step to what one copy comes to: digests,
    losses, norms and figures. The optimizer's state is split over them or not, and sums wait here
    or there; of the last steps most ranks compute nothing."""
    alone, loss, [counts] = run("alone", {"data": 1})
    assert list(map(int, alone)) == list(range(1, STEPS + 1))
    assert len({digest for digest, _ in alone.values()}) == STEPS
    assert all(stats["grad_norm"] > 0.1 for _, stats in alone.values())  # each step clips
    four, _, shares = run("four", {"data": 4, "distributed_optimizer": True}, until=2)
    assert four == {step: alone[step] for step in ("1", "2")}
    assert sum(share[0] for share in shares) == counts[0]
    here = {"data": 2, "offload_segment_sums": True, "offload_optimizer": True}
    two, _, _ = run("two", here, "four", until=3)
    assert two == {"3": alone["3"]}
    one, same, _ = run("one", {"data": 1, "distributed_optimizer": True}, "two")
    assert (one, same) == ({"4": alone["4"]}, loss)
    last, same, shares = run("last", {"data": 4}, "two")
    assert (last, same) == (one, loss)
    assert [share[0] for share in shares] == [0, 1, 0, 1]
    halves, _, _ = run("halves", {"data": 1, "grad_segments": 2}, until=1)
    assert halves["1"] != alone["1"]  # so the order of sums is seen


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_copies_of_any_layout_are_one(run, layout):
    """With ranks that share a model in other ways, which are the same on both sides."""
    alone = run("alone", layout)
    for name, more in (("whole", {}), ("split", {"distributed_optimizer": True})):
        found = run(name, {**layout, "data": 2, **more})
        assert found[:2] == alone[:2]
