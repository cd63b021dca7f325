"""Atomic writing: a file gets its name once it is complete and on the disk."""

import os
import sys
from pathlib import Path

import pytest

from m3er_fast.atomic_files import replacing


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")
    return path


def full(*_):
    raise OSError(28, "No space left on device")


def test_the_content_is_what_the_block_wrote_and_nothing_else_is_left(path):
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "former"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be synced")
def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_afterwards(path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.replace

    def note_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    with replacing(path) as partial:
        partial.write_text("new")
        file = partial.stat().st_ino
    assert events == [file, "rename", path.parent.stat().st_ino]


@pytest.mark.parametrize("call", [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_the_former_file_alone(call, path, monkeypatch):
    monkeypatch.setattr(*call, full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "former"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_former_file_alone(error, path):
    def write_half():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "former"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_before_it_writes_raises_just_that(path):
    with pytest.raises(ValueError, match="early"), replacing(path):
        raise ValueError("early")
    assert path.read_text() == "former"
