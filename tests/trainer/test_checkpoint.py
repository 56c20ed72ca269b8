"""Checkpoints: whole or invisible, verified when loaded, and never of another run by mistake."""

import hashlib
import json
import shutil
import threading
import time

import pytest
import torch
from helpers import assert_same_bits, file_size_limit, run_python

from samebit.trainer import checkpoint_writer
from samebit.trainer.checkpoint import (
    MANIFEST,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from samebit.trainer.checkpoint_writer import CheckpointWriter

STATE = {"step": 3, "params": {"a": torch.arange(6.0).view(2, 3)}, "nested": {"list": [1, 2.5]}}


def save(root, step, keep=10, **manifest):
    CheckpointWriter(root, keep, background=False).save(step, STATE | {"step": step}, manifest)
    return root / f"step_{step:08d}"


def test_what_was_saved_is_loaded(tmp_path):
    """Bits, types and the manifest's own fields come back."""
    path = save(tmp_path, 3, config_digest="abc", progress={"reward": 0.5})
    assert path == tmp_path / "step_00000003"
    checkpoint = latest_checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.step) == (path, 3)
    assert checkpoint.manifest["progress"] == {"reward": 0.5}
    state = checkpoint.load()
    assert torch.equal(state["params"]["a"], STATE["params"]["a"])
    assert state["nested"] == STATE["nested"]
    checkpoint.require("config_digest", "abc", "configuration")


def test_there_may_be_none(tmp_path):
    """A fresh run's folder, or none at all, holds no checkpoint and is no error."""
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_the_newest_by_step_is_taken_and_the_oldest_removed(tmp_path):
    """Retention must never remove the newest, and order is by step, not by time."""
    for step in (1, 2, 30, 4):
        save(tmp_path, step, keep=3)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 4, 30]
    assert latest_checkpoint(tmp_path).step == 30
    save(tmp_path, 31, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000031"]


def test_steps_beyond_eight_digits_stay_in_order(tmp_path):
    """Names sort as text: a ninth digit must not sort below eight."""
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert [c.step for c in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]
    assert latest_checkpoint(tmp_path).step == 100_000_000


def test_copies_and_links_beside_them_are_left_alone(tmp_path):
    """Whatever a user keeps there is read, removed or counted by nobody."""
    save(tmp_path, 2)
    checkpoint = tmp_path / "step_00000002"
    for name in ("step_00000002.bak", "step_best", "step_9", "step_000000099", "step_00000099x"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "latest").symlink_to(checkpoint)
    (tmp_path / "step_00000077").symlink_to(checkpoint)
    (tmp_path / "step_00000088").write_text("a file")
    (tmp_path / "step_00000099").mkdir()
    (tmp_path / ".step_notes").mkdir()
    (tmp_path / ".step_00000001.old").symlink_to(checkpoint)
    (tmp_path / ".step_todo").write_text("x")
    others = {p.name for p in tmp_path.iterdir()} - {"step_00000002"}
    for step in (3, 4):
        save(tmp_path, step, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == others | {"step_00000004"}
    assert [c.step for c in list_checkpoints(tmp_path)] == [4]
    assert latest_checkpoint(tmp_path).step == 4
    assert read_checkpoint(tmp_path / "step_best").verify().step == 2
    shutil.rmtree(tmp_path / "step_00000004")
    assert latest_checkpoint(tmp_path) is None


def test_what_stands_in_the_way_is_moved_aside(tmp_path, capsys):
    """A link or a folder under the name of a step ends no run and is not lost."""
    save(tmp_path, 1)
    (tmp_path / "step_00000003").symlink_to(tmp_path / "step_00000001")
    (tmp_path / "step_00000003.aside").touch()
    save(tmp_path, 3)
    assert latest_checkpoint(tmp_path).verify().step == 3
    assert (tmp_path / "step_00000003.aside1").is_symlink()
    assert "step_00000003 was no checkpoint of a run; it is step_00000003.aside1 now" in (
        capsys.readouterr().err
    )


def test_a_copy_under_another_steps_name_is_named(tmp_path):
    """It is not resumed by mistake, and not removed."""
    save(tmp_path, 3)
    copy = shutil.copytree(tmp_path / "step_00000003", tmp_path / "step_00000001")
    save(tmp_path, 4, keep=1)
    assert copy.exists()
    copy.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="step_00000009 holds the checkpoint of step 3: rena"):
        latest_checkpoint(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path):
    """A resumed run may come to the same step again."""
    save(tmp_path, 3, note="first")
    save(tmp_path, 3, note="second")
    assert [c.manifest["note"] for c in list_checkpoints(tmp_path)] == ["second"]
    latest_checkpoint(tmp_path).load()


def test_a_folder_without_a_manifest_is_ignored(tmp_path):
    """It was never finished, or it is somebody else's."""
    save(tmp_path, 3)
    save(tmp_path, 7)
    (tmp_path / "step_00000007" / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("content", [b"", b'{"step": 7, "fil', b"[]", b"\x00" * 64])
def test_a_damaged_manifest_is_reported_by_name(tmp_path, content):
    """A torn manifest (a disk that lied about fsync) must name its file, not raise from json."""
    save(tmp_path, 7)
    (tmp_path / "step_00000007" / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="step_00000007"):
        latest_checkpoint(tmp_path)


def test_a_leftover_of_a_killed_save_is_ignored_and_replaced(tmp_path):
    """Even a complete one that was not yet renamed."""
    save(tmp_path, 3)
    leftover = tmp_path / ".step_00000007.tmp"
    leftover.mkdir()
    (leftover / MANIFEST).write_text(json.dumps({"step": 7, "files": {}}))
    (leftover / "stray").write_text("")
    assert latest_checkpoint(tmp_path).step == 3
    path = save(tmp_path, 7)
    assert not leftover.exists()
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, "rank_00000.pt"]


def test_a_leftover_of_another_step_does_not_stay_for_ever(tmp_path):
    """A run killed while it saved step 7 and resumed with another interval never saves step 7."""
    save(tmp_path, 3)
    (tmp_path / ".step_00000007.tmp").mkdir()
    save(tmp_path, 9)
    assert not (tmp_path / ".step_00000007.tmp").exists()


@pytest.fixture
def gate(monkeypatch):
    """Files are written once it is set."""
    event, write = threading.Event(), torch.save

    def when_open(*arguments):
        assert event.wait(60)
        write(*arguments)

    monkeypatch.setattr(torch, "save", when_open)
    return event


def test_a_state_may_change_while_it_is_written(tmp_path, gate):
    """The run goes on: what is written is what was, in memory that the next save uses again."""
    writer = CheckpointWriter(tmp_path, keep=2)
    state = {"step": 0, "params": {"a": torch.zeros(5)}, "moments": [torch.zeros(2, 3)]}
    for step in (1, 2):
        gate.clear()
        state["step"] = step
        for tensor in (state["params"]["a"], state["moments"][0]):
            tensor.fill_(step)
        writer.save(step, state, {})
        for tensor in (state["params"]["a"], state["moments"][0]):
            tensor.fill_(-1)
        writer.poll()
        assert [c.step for c in list_checkpoints(tmp_path)] == list(range(1, step))
        gate.set()
        writer.finish()
    for step, checkpoint in enumerate(list_checkpoints(tmp_path), 1):
        found = checkpoint.load()
        assert found["step"] == step
        assert torch.equal(found["params"]["a"], torch.full((5,), float(step)))
        assert torch.equal(found["moments"][0], torch.full((2, 3), float(step)))


def test_a_poll_tells_of_a_failure_while_others_write(tmp_path, monkeypatch):
    """One rank cannot: the first one would wait for its file for ever."""
    monkeypatch.setattr(checkpoint_writer, "gather_objects", lambda state: ["busy", state])
    writer = CheckpointWriter(tmp_path, keep=2)
    deadline = time.monotonic() + 30

    def go_on():
        while time.monotonic() < deadline:
            writer.poll()

    with file_size_limit(100):
        writer.save(1, STATE, {})
        with pytest.raises(CheckpointError, match="cannot write .*rank_00000.pt"):
            go_on()
    assert list(tmp_path.iterdir()) == []


def test_a_state_may_change_its_shapes_and_types(tmp_path):
    """Memory that is used again must hold every bit of what comes next."""
    writer = CheckpointWriter(tmp_path, keep=9)
    states = [torch.tensor([1.5, 2.5]).to(dtype) for dtype in (torch.bfloat16, torch.float64)]
    states += [torch.full((2,), 2**-60, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)]
    for step, tensor in enumerate(states):
        writer.save(step, {"a": {"b": tensor}}, {})
    writer.finish()
    for checkpoint, tensor in zip(list_checkpoints(tmp_path), states, strict=True):
        assert_same_bits(checkpoint.load()["a"]["b"], tensor)


def test_a_save_waits_for_the_one_before(tmp_path, gate):
    """And what one process alone has begun is whole after an error, without its help."""
    writer = CheckpointWriter(tmp_path, keep=5)
    writer.save(1, STATE, {})
    gate.set()
    writer.save(2, STATE, {})
    assert list_checkpoints(tmp_path)[0].step == 1
    writer.close()
    assert latest_checkpoint(tmp_path).verify().step == 2


def test_a_disk_that_fills_up_is_told_when_it_is_noticed(tmp_path):
    """By whatever asks next; the half is gone, the one before is whole, and saving goes on."""
    writer = CheckpointWriter(tmp_path, keep=5)
    writer.save(1, STATE, {})
    writer.finish()
    big = {"step": 2, "params": torch.zeros(100_000)}
    with file_size_limit(50_000):
        writer.save(2, big, {})
        with pytest.raises(CheckpointError, match=r"step_00000002.tmp/rank_00000.pt.*too large"):
            writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    writer.save(2, big, {})
    writer.finish()
    assert latest_checkpoint(tmp_path).verify().step == 2


def test_a_copy_that_does_not_fit_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    """The host's memory is not the device's; the message says how to do without."""

    def no_memory(*_arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(checkpoint_writer, "host_copy", no_memory)
    with pytest.raises(CheckpointError, match="out of memory.*background_checkpoints=false"):
        CheckpointWriter(tmp_path, keep=1).save(1, STATE, {})
    assert not list(tmp_path.iterdir())


def test_two_ranks_files_become_a_checkpoint_without_the_main_threads(tmp_path, monkeypatch):
    """The first rank's thread waits for the second one's digest, whatever the run does."""
    monkeypatch.setattr(checkpoint_writer, "place", lambda: (0, 2))
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, STATE, {})
    other = tmp_path / ".step_00000001.tmp" / "rank_00001.pt"
    other.write_bytes(b"its state")
    other.with_name("rank_00001.pt.sha256").write_text(hashlib.sha256(b"its state").hexdigest())
    writer.close()
    checkpoint = latest_checkpoint(tmp_path).verify()
    names = ["manifest.json", "rank_00000.pt", "rank_00001.pt"]
    assert sorted(p.name for p in checkpoint.path.iterdir()) == names


def test_after_an_error_a_rank_that_died_is_not_waited_for(tmp_path, monkeypatch, capsys):
    """What cannot become whole is removed, and said."""
    monkeypatch.setattr(checkpoint_writer, "place", lambda: (0, 2))
    monkeypatch.setattr(checkpoint_writer, "_OTHERS_S", 0.05)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, STATE, {})
    writer.close()
    assert "step_00000001.tmp: another rank's file is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_later_rank_ends_once_its_own_file_is_written(tmp_path, monkeypatch):
    """The first one's manifest is not its concern."""
    monkeypatch.setattr(checkpoint_writer, "place", lambda: (1, 2))
    (tmp_path / ".step_00000001.tmp").mkdir()
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, STATE, {})
    writer.close()
    names = ["rank_00001.pt", "rank_00001.pt.sha256"]
    assert sorted(p.name for p in (tmp_path / ".step_00000001.tmp").iterdir()) == names


# Killed while the state is pickled, or after the state and before the manifest.
DYING_SAVE = """
import os, sys
from collections import UserDict
from pathlib import Path
from samebit.trainer.checkpoint_writer import CheckpointWriter

class Dying:
    def __reduce__(self):
        os._exit(0)

class DyingManifest(UserDict):
    def __iter__(self):
        os._exit(0)

root, moment = Path(sys.argv[1]), sys.argv[2]
state = {"big": list(range(1000)), "x": Dying() if moment == "state" else 1}
CheckpointWriter(root, keep=1, background=False).save(7, state, DyingManifest(note="x"))
"""


@pytest.mark.parametrize("moment", ["state", "manifest"])
def test_a_killed_save_leaves_the_last_checkpoint_valid(tmp_path, moment):
    """The old checkpoint goes only after the new one is whole."""
    save(tmp_path, 3)
    run_python(DYING_SAVE, tmp_path, moment)
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["step_00000003"]
    assert latest_checkpoint(tmp_path).load()["step"] == 3
    save(tmp_path, 7, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_byte_is_found(tmp_path, place):
    """Silent disk damage must not become weights."""
    path = save(tmp_path, 3) / "rank_00000.pt"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    message = r"rank_00000.pt is damaged: SHA-256 .* manifest says"
    with pytest.raises(CheckpointError, match=message):
        latest_checkpoint(tmp_path).load()


def test_a_truncated_file_is_found(tmp_path):
    """As above, for a file that lost its end."""
    path = save(tmp_path, 3) / "rank_00000.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        latest_checkpoint(tmp_path).load()


def test_a_missing_file_is_named(tmp_path):
    """The message must say which file of which checkpoint."""
    (save(tmp_path, 3) / "rank_00000.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000003/rank_00000.pt is missing"):
        latest_checkpoint(tmp_path).load()


def test_another_configuration_is_refused(tmp_path):
    """Both values stand in the message; a missing field is another value too."""
    save(tmp_path, 3, config_digest="abc")
    checkpoint = latest_checkpoint(tmp_path)
    message = "was written under another configuration: abc there, xyz here"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.require("config_digest", "xyz", "configuration")
    with pytest.raises(CheckpointError, match="another numerics profile: None there, p here"):
        checkpoint.require("numerics", "p", "numerics profile")
