"""The disk that loses power shows what POSIX lets it: good writers pass, careless ones fail."""

import os

import pytest
from crashing_disk import CrashingDisk


def write(path, text, synced=True):
    with path.open("w") as file:
        file.write(text)
        file.flush()
        if synced:
            os.fsync(file.fileno())


def sync(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def in_place(folder):
    write(folder / "file", "new text")


def without_its_bytes(folder):
    write(folder / "aside", "new text", synced=False)
    (folder / "aside").replace(folder / "file")
    sync(folder)


def without_its_name(folder):
    write(folder / "aside", "new text")
    (folder / "aside").replace(folder / "file")


def removed_first(folder):
    write(folder / "aside", "new text")
    (folder / "file").unlink()
    (folder / "aside").rename(folder / "file")
    sync(folder)


def in_order(folder):
    without_its_name(folder)
    sync(folder)


@pytest.mark.parametrize(
    ("writer", "during", "after"),
    [
        (in_place, {"old", "", "new ", "new text", "\0" * 8}, {"new text"}),
        (without_its_bytes, {"old", "", "new ", "new text", "\0" * 8}, None),
        (without_its_name, {"old", "new text"}, {"old", "new text"}),
        (removed_first, {"old", None, "new text"}, {"new text"}),
        (in_order, {"old", "new text"}, {"new text"}),
    ],
)
def test_what_a_file_may_hold(tmp_path, writer, during, after):
    """While it is replaced, and once that was reported."""
    disk = CrashingDisk(tmp_path / "disk")
    disk.folder.mkdir()
    (disk.folder / "file").write_text("old")
    with disk.recording():
        writer(disk.folder)
        disk.report("done")
    found = {False: set(), True: set()}
    for crash in disk.crashes(tmp_path / "after"):
        file = crash.folder / "file"
        found[bool(crash.reported)].add(file.read_text() if file.exists() else None)
    assert found[False] == during
    assert found[True] == (during - {"old"} if after is None else after)


def test_a_new_folder_is_lost_with_all_that_is_in_it(tmp_path):
    """Until the folder above it is synced."""
    disk = CrashingDisk(tmp_path / "disk")
    with disk.recording():
        (disk.folder / "a").mkdir()
        write(disk.folder / "a" / "file", "text")
        sync(disk.folder / "a")
        disk.report("inside")
        sync(disk.folder)
        disk.report("outside")
    found = {
        (*crash.reported, *sorted(p.name for p in crash.folder.rglob("*")))
        for crash in disk.crashes(tmp_path / "after")
    }
    assert ("inside",) in found
    assert ("inside", "outside") not in found
    assert ("inside", "outside", "a", "file") in found


def test_names_of_two_folders_go_their_own_ways(tmp_path):
    """But one rename is never half done, and an exchange neither."""
    disk = CrashingDisk(tmp_path / "disk")
    for name in ("a", "b"):
        (disk.folder / name).mkdir(parents=True)
    (disk.folder / "a" / "x").touch()
    with disk.recording():
        (disk.folder / "a" / "x").rename(disk.folder / "b" / "x")
        (disk.folder / "a" / "y").touch()
        sync(disk.folder / "b")
        disk.report("b")
    found = {
        (
            *crash.reported,
            *sorted(str(p.relative_to(crash.folder)) for p in crash.folder.rglob("*")),
        )
        for crash in disk.crashes(tmp_path / "after")
    }
    assert found == {
        ("a", "a/x", "b"),
        ("a", "b", "b/x"),
        ("a", "a/y", "b", "b/x"),
        ("b", "a", "b", "b/x"),
        ("b", "a", "a/y", "b", "b/x"),
    }


def test_what_was_there_is_safe_and_so_is_a_link(tmp_path):
    """Only what was recorded can be lost."""
    disk = CrashingDisk(tmp_path / "disk")
    (disk.folder / "a").mkdir(parents=True)
    (disk.folder / "a" / "file").write_text("text")
    (disk.folder / "link").symlink_to("a")
    with disk.recording():
        (disk.folder / "b").mkdir()
    crashes = list(disk.crashes(tmp_path / "after"))
    assert len(crashes) == 2
    for crash in crashes:
        assert (crash.folder / "link" / "file").read_text() == "text"
