"""The machine dies at any instant of saving: whole checkpoints, and none reported is lost."""

import pytest
import torch
from crashing_disk import CrashingDisk

from samebit.trainer import checkpoint_writer
from samebit.trainer.checkpoint import CheckpointError, list_checkpoints
from samebit.trainer.checkpoint_writer import CheckpointWriter, remove_leftovers


def state_of(step, rank=0):
    return {"step": step, "rank": rank, "params": {"a": torch.full((3,), step + rank / 8)}}


def found_in(root, num_ranks=1):
    """(step, note) of every checkpoint there, each of which is whole and holds its own state."""
    found = []
    for checkpoint in list_checkpoints(root):
        states = list(checkpoint.load_all())
        assert len(states) == num_ranks
        for rank, state in enumerate(states):
            expected = state_of(checkpoint.step, rank)
            assert torch.equal(state.pop("params")["a"], expected.pop("params")["a"])
            assert state == expected
        found.append((checkpoint.step, checkpoint.manifest["note"]))
    return found


def replay(disk, folder, num_ranks=1, root="checkpoints"):
    """(what was reported, what is there) of every crash; leftovers can be removed."""
    results = []
    for crash in disk.crashes(folder):
        found = found_in(crash.folder / root, num_ranks)
        if (crash.folder / root).exists():
            remove_leftovers(crash.folder / root)
            assert not [*(crash.folder / root).glob(".*")], crash.what
            assert found_in(crash.folder / root, num_ranks) == found, crash.what
        results.append((crash.reported, found, crash.what))
    return results


def save_in_turn(disk, keep, *saves):
    writer = CheckpointWriter(disk.folder / "checkpoints", keep, background=False)
    with disk.recording():
        for step, note in saves:
            writer.save(step, state_of(step), {"note": note})
            disk.report((step, note))


@pytest.mark.parametrize("keep", [1, 2])
def test_one_after_another(tmp_path, keep):
    """The oldest goes only once the newest is there to stay, and never more than `keep` stay."""
    disk = CrashingDisk(tmp_path / "disk")
    saves = [(1, ""), (2, ""), (3, "")]
    save_in_turn(disk, keep, *saves)
    for reported, found, what in replay(disk, tmp_path / "after"):
        at_least = reported[-keep:]
        assert found[-keep:] in (at_least, saves[: len(reported) + 1][-keep:]), what
        assert len(found) <= keep + 1, what
    assert [reported, found] == [saves, saves[-keep:]]


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_same_step_again(tmp_path, monkeypatch, exchanges):
    """The old one or the new one, and where the file system cannot exchange two folders for an
    instant neither, but the one before."""
    if not exchanges:
        monkeypatch.setattr(checkpoint_writer, "exchange", lambda *_: False)
    disk = CrashingDisk(tmp_path / "disk")
    save_in_turn(disk, 3, (1, ""), (2, "first"), (2, "second"))
    first, second, neither = ([(1, ""), *more] for more in ([(2, "first")], [(2, "second")], []))
    seen = []
    for reported, found, what in replay(disk, tmp_path / "after"):
        if len(reported) == 2:
            assert found in ([first, second] if exchanges else [first, second, neither]), what
            seen.append(found)
        assert len(reported) < 3 or found == second, what
    assert first in seen
    assert second in seen
    assert (neither in seen) != exchanges


@pytest.mark.parametrize("made", ["", "outputs/runs", "outputs/runs/run/checkpoints"])
def test_in_folders_that_are_new(tmp_path, made):
    """The names of all of them are safe with the first checkpoint, also of those that another
    process has made and not synced."""
    disk = CrashingDisk(tmp_path / "disk")
    root = "outputs/runs/run/checkpoints"
    with disk.recording():
        (disk.folder / made).mkdir(parents=True, exist_ok=True)
        writer = CheckpointWriter(disk.folder / root, 1, background=False)
        writer.save(2, state_of(2), {"note": ""})
        disk.report("saved")
    results = replay(disk, tmp_path / "after", root=root)
    assert all(found == [(2, "")] for reported, found, _ in results if reported)
    assert [found for reported, found, _ in results if not reported][0] == []


def test_of_two_ranks(tmp_path, monkeypatch):
    """It is whole with the files of both, or not there."""
    disk = CrashingDisk(tmp_path / "disk")
    root = disk.folder / "checkpoints"
    with disk.recording():
        writers = [CheckpointWriter(root, 1) for _ in range(2)]
        for step in (1, 2):
            for rank, writer in enumerate(writers):
                monkeypatch.setattr(checkpoint_writer, "place", lambda rank=rank: (rank, 2))
                writer.save(step, state_of(step, rank), {"note": ""})
            for writer in reversed(writers):
                writer.finish()
            disk.report(step)
    for reported, found, what in replay(disk, tmp_path / "after", num_ranks=2):
        assert len(found) <= 2, what
        newest = found[-1][0] if found else 0
        assert newest in (len(reported), len(reported) + 1), what
    assert found == [(2, "")]
    with pytest.raises(CheckpointError, match="written by 2 processes; there are 1 here"):
        list_checkpoints(root)[-1].load()
    for rank in range(2):
        file = root / "step_00000002" / f"rank_{rank:05d}.pt"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"rank_{rank:05d}.pt is damaged"):
            list_checkpoints(root)[-1].verify()
        file.write_bytes(whole)
