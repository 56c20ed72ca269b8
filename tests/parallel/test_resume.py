"""Checkpoints of several ranks: one file each, written together, resumed to the same bytes."""

import json

import pytest

from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint


@pytest.mark.parametrize("mode", ["tensor", "context", "data", "optimizer"])
def test_two_ranks_resume_to_the_same_bytes(run_ranks, qwen3_path, mode, tmp_path):
    """Every step after the checkpoint has the same numbers again, and the weights one digest. A
    rank that cannot write is told of on both, and leaves the checkpoint before as it was."""
    root = tmp_path / "checkpoints"
    run_ranks("resume", 2, qwen3_path, mode, root, tmp_path / "out.json")
    found = [json.loads((tmp_path / f"out.{r}").read_text()) for r in range(2)]
    for rank in found:
        assert rank["resumed"] == rank["whole"]
        assert rank["resumed_digest"] == rank["whole_digest"] == found[0]["whole_digest"]
        assert rank["files"] == ["rank_00000.pt", "rank_00001.pt"]
        assert rank["left"] == ["step_00000002"]
    assert found[0]["refused"] == f"rank 1: {found[1]['refused']}"
    assert "cannot write" in found[1]["refused"]
    assert "rank_00001.pt" in found[1]["refused"]
    checkpoint = latest_checkpoint(root)
    with pytest.raises(CheckpointError, match="written by 2 processes; there are 1 here"):
        checkpoint.load()
    other = checkpoint.path / "rank_00001.pt"
    damaged = bytearray(other.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    other.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"rank_00001\.pt is damaged"):
        checkpoint.verify()
