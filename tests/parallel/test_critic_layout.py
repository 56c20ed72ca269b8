"""A critic under a layout of its own, in its policy's processes: the numbers are one process's."""

import json

import pytest
import torch

ONE = {"tensor": 1, "sequence": False, "pipeline": 1, "virtual_pipeline": 1}
ONE |= {"context": 1, "data": 1}
WHOLE = [
    {"data": 2},
    {"data": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "recompute": "full"},
    {"context": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "offload_optimizer": True},
]
SPLIT = [{"tensor": 2}, {"tensor": 2, "sequence": True}]


@pytest.fixture(scope="module")
def alone(folder, run_together, tmp_path_factory):
    """What one process finds."""
    file = tmp_path_factory.mktemp("alone") / "step.pt"
    run_together("rank_critic.alone", [(folder, file)])
    return file


def found_of(run_ranks, size, folder, beside, own, alone, tmp_path):
    """Of every rank what its program has found."""
    layouts = json.dumps(beside), json.dumps([ONE | layout for layout in own])
    run_ranks("rank_critic.layouts", size, folder, *layouts, alone, tmp_path / "out.json")
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(size)]
    assert all(len(rank["critics"]) == len(own) for rank in found)
    return found


@pytest.mark.parametrize(
    ("beside", "own"),
    [
        ({"tensor": 2, "sequence": True}, WHOLE),
        pytest.param(
            {"pipeline": 2, "virtual_pipeline": 2},
            [*SPLIT, *WHOLE[:1]],
            marks=pytest.mark.long,
        ),
    ],
    ids=["tensor", "pipeline"],
)
def test_a_critic_of_another_layout_takes_the_step_of_one_process(
    run_ranks, folder, alone, beside, own, tmp_path
):
    """Loss, norm and every gradient; its values to the bit where layers are whole. The policy's
    steps have the same bits as without a critic."""
    expected = torch.load(alone)
    for rank in found_of(run_ranks, 2, folder, beside, own, alone, tmp_path):
        with_critics, without = rank["digests"]
        assert with_critics == without
        for layout, (figures, errors) in zip(own, rank["critics"], strict=True):
            assert figures == pytest.approx(expected, rel=1e-6), layout
            assert max(errors.values()) < 1e-6, (layout, errors)
            values = [error for name, error in errors.items() if name.startswith("values")]
            assert values
            assert "tensor" in layout or not any(values), layout


@pytest.mark.long
def test_four_processes_of_two_layouts(run_ranks, folder, alone, tmp_path):
    """Several kinds of groups at once, in both."""
    expected, both = torch.load(alone), {"context": 2, "pipeline": 2}
    own = [both, {"pipeline": 2, "data": 2}, {"tensor": 2, "sequence": True, "pipeline": 2}]
    for layouts in ({"tensor": 2, "data": 2}, own), (both, [{"tensor": 2, "data": 2}]):
        for rank in found_of(run_ranks, 4, folder, layouts[0], layouts[1], alone, tmp_path):
            assert rank["digests"][0] == rank["digests"][1]
            for figures, errors in rank["critics"]:
                assert figures == pytest.approx(expected, rel=1e-6)
                assert max(errors.values()) < 1e-6, errors
