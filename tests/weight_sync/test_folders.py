"""Folders of ours: locked against other processes, and replaced as a whole or not at all."""

import fcntl
import multiprocessing
import os
import socket
import stat
from pathlib import Path

import pytest
from crashing_disk import CrashingDisk
from helpers import run_python

from samebit.weight_sync import folders
from samebit.weight_sync.disk import exchange, sync
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


def test_nothing_of_an_earlier_holder_is_said(tmp_path):
    """A killed process left a longer name."""
    (tmp_path / LOCK).write_text("process 4000000000 on " + "a" * 300)
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    """The holder lets go between our opening of the file and our locking it."""
    holder, lock = FolderLock(tmp_path), fcntl.flock
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *arguments: (holder.release(), lock(*arguments)))
        ours = FolderLock(tmp_path)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    ours.release()


def test_a_lock_is_held_until_its_name_is_gone(tmp_path, monkeypatch):
    """Else the next one's name would be removed, and a third process let in."""
    lock, unlink, refused = FolderLock(tmp_path), Path.unlink, []

    def watched(path, **settings):
        try:
            FolderLock(tmp_path)
        except FolderInUseError:
            refused.append(path)
        unlink(path, **settings)

    monkeypatch.setattr(Path, "unlink", watched)
    lock.release()
    assert refused == [tmp_path / LOCK]


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
    lock.drop()  # as if this process were killed
    FolderLock(tmp_path).release()
    here.send("end")
    child.join()


def replace(folder):
    with replacing(folder) as new:
        (new / "weights").write_text("new")
        (new / "folder").mkdir()
        (new / "folder" / "more").write_text("new")


def contents(folder):
    """Of the files that are not ours; None for a folder that is not there."""
    if not folder.exists():
        return None
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_an_exchange_that_fails_says_why(tmp_path):
    """Only a file system that knows no exchange is no error."""
    with pytest.raises(FileNotFoundError, match="No such file.*'.*/a' -> '.*/b'"):
        exchange(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("before", [None, {"weights": "old"}])
def test_dead_at_any_instant(tmp_path, monkeypatch, before, exchanges):
    """Old or new, whole; where the file system cannot exchange two folders, for an instant neither,
    until the next use. Siblings with names like ours stay."""
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    disk = CrashingDisk(tmp_path / "disk")
    siblings = [".out.old", ".out.tmp", ".out.samebit-mine"]
    for other in siblings:
        (disk.folder / other).mkdir(parents=True)
        (disk.folder / other / "precious").write_text("x")
    if before is not None:
        (disk.folder / "out").mkdir()
        (disk.folder / "out" / "weights").write_text("old")
    with disk.recording():
        replace(disk.folder / "out")
        disk.report("replaced")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what follows need not wait
    seen, new = [], {"weights": "new", "folder/more": "new"}
    for crash in disk.crashes(tmp_path / "after"):
        out = crash.folder / "out"
        found = contents(out)
        assert found in ([new] if crash.reported else [before, new, None]), crash.what
        seen.append(found)
        with replacing(out) as again:  # what was begun is ended now
            assert contents(out) in ([before, new] if before or found else [before]), crash.what
            (again / "weights").write_text("newer")
        assert contents(out) == {"weights": "newer"}
        assert read_marker(out)["kind"] == "model"
        for left in crash.folder.glob(".out.*"):
            # One that had no marker yet is empty but for what we lay into every folder.
            ours = {p.name for p in left.iterdir()} <= {LOCK, ".samebit.tmp"}
            assert ours or left.name in siblings, crash.what
        assert {p.parent.name for p in crash.folder.rglob("precious")} == set(siblings)
    assert seen[0] == before
    assert new in seen
    assert (None in seen) == (before is None or not exchanges)


def test_dead_at_any_instant_of_ending_what_was_begun(tmp_path, monkeypatch):
    """What a first crash left between the two renames outlives a second one."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    out = tmp_path / "disk" / "out"
    out.mkdir(parents=True)
    (out / "weights").write_text("old")
    rename = Path.rename

    def dying(path, target):
        if path.name == "new" and target == out:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(folders, "_discard", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            replace(out)
    assert not out.exists()
    disk = CrashingDisk(tmp_path / "disk")
    with disk.recording(), replacing(out):
        disk.report("ended")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    new = {"weights": "new", "folder/more": "new"}
    for crash in disk.crashes(tmp_path / "after", ["kept"]):
        with replacing(crash.folder / "out"):
            found = contents(crash.folder / "out")
        assert found in ([new, {}] if crash.reported else [new]), crash.what


def test_what_is_left_of_a_longer_name_is_anothers(tmp_path, monkeypatch):
    """`out` is replaced beside what a killed process left of replacing `out.samebit-2`."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    other = tmp_path / "out.samebit-2"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_put_in_place", lambda *_: None)
        patch.setattr(folders, "_discard", lambda _: None)
        replace(other)
    [left] = tmp_path.glob(".out.samebit-2.samebit-*")
    (left / "old").mkdir()
    with replacing(tmp_path / "out"):
        assert not (tmp_path / "out").exists()
    assert contents(left / "new") == {"weights": "new", "folder/more": "new"}
    with replacing(other):
        assert contents(other) == {"weights": "new", "folder/more": "new"}


def test_a_rename_that_fails_leaves_the_old(tmp_path, monkeypatch):
    """Where two names cannot be exchanged, the old one comes back."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    out, rename = tmp_path / "out", Path.rename
    replace(out)

    def failing(path, target):
        if path.name == "new":
            raise PermissionError("it may not be written")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError), replacing(out) as new:
        (new / "weights").write_text("newer")
    assert contents(out) == {"weights": "new", "folder/more": "new"}
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_synced():
    """There are file systems that cannot sync folders: only a file is an error."""
    sync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        sync(Path("/proc/self/status"))


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
