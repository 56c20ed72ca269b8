"""Folders of ours: locked against other processes, and replaced as a whole or not at all."""

import multiprocessing
import os
import stat

import pytest
from helpers import dying_at, run_python, tree

from samebit.weight_sync.folders import LOCK, FolderInUseError, FolderLock, read_marker, replacing

HOLDER = """
import sys, os
from pathlib import Path
from samebit.weight_sync.folders import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print(os.getpid())
os._exit(0)  # as a kill: nothing is tidied up
"""


def test_one_process_at_a_time(tmp_path):
    """The refusal says who; the end of the holder, even a kill, lets others in."""
    lock = FolderLock(tmp_path)
    who = f"{tmp_path} is in use by process {os.getpid()} on .+: wait until it ends"
    with pytest.raises(FolderInUseError, match=who):
        FolderLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    pid = run_python(HOLDER, tmp_path).strip()
    assert f"process {pid} on " in (tmp_path / LOCK).read_text()
    FolderLock(tmp_path).release()


def try_to_lock(folder, connection):
    """In a forked child, which must neither hold nor release the parent's lock."""
    try:
        FolderLock(folder)
    except FolderInUseError:
        connection.send("refused")
    connection.recv()


def test_a_forked_child_does_not_keep_it(tmp_path):
    """A reward may fork; its orphan would lock out the resumed run."""
    lock = FolderLock(tmp_path)
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=try_to_lock, args=(tmp_path, there))
    child.start()
    assert here.recv() == "refused"
    lock.release()
    FolderLock(tmp_path).release()
    here.send("end")
    child.join()


def replace(folder):
    with replacing(folder) as new:
        (new / "weights").write_text("new")
        (new / "more").write_text("new")


@pytest.mark.parametrize("existed", [True, False])
def test_killed_at_any_instant(tmp_path, existed):
    """Old or new, whole, after the next use at the latest; siblings with names like ours stay."""
    for other in (".out.old", ".out.tmp", ".out.samebit-mine"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "precious").write_text("x")
    siblings = tree(tmp_path)
    folder = tmp_path / "out"
    for instant in range(100):
        if existed:
            folder.mkdir()
            (folder / "weights").write_text("old")
        finished = dying_at(instant, lambda: replace(folder))
        found = (
            {p.name: p.read_text() for p in folder.iterdir() if p.name[0] != "."}
            if (folder.exists())
            else None
        )
        new = {"weights": "new", "more": "new"}
        assert found in ([{"weights": "old"}, new, None] if existed else [None, new])
        replace(folder)
        assert read_marker(folder)["kind"] == "model"
        assert {p.name for p in tmp_path.iterdir()} - {"out"} >= {".out.old", ".out.tmp"}
        for file in (folder / "weights", folder / "more", folder / ".samebit"):
            file.unlink()
        folder.rmdir()
        assert siblings.items() <= tree(tmp_path).items()
        if finished:
            break
    assert finished
    # A kill before the marker is written leaves nothing but an empty folder or its lock.
    for left in set(tmp_path.glob(".out.samebit-*")) - {tmp_path / ".out.samebit-mine"}:
        assert {p.name for p in left.iterdir()} <= {LOCK, ".samebit.tmp"}


def test_two_at_once_are_refused(tmp_path):
    """Neither destroys what the other writes."""
    with replacing(tmp_path / "out") as new:
        (new / "weights").write_text("first")
        with (
            pytest.raises(FolderInUseError, match=r"/out is in use by process"),
            replacing(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out" / "weights").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path):
    """It goes on pointing there."""
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "weights").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "disk" / "out").stat().st_mode) & 0o077 != 0
