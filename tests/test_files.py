"""Writing files: whole, or as they were."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.files import write_atomically, write_text


def test_content_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_text(path, "ä\n")
    write_text(path, "ö\n")
    assert path.read_bytes() == "ö\n".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_failing_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("pipeline.files.write_through", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        write_text(path, "new")
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_used_up(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"

    def die(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # a kill tidies nothing
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"half")
    assert [p.name for p in tmp_path.iterdir()] == [".metrics.json.tmp"]
    write_atomically(path, b"whole")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"whole"


def test_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises(OSError, match="models") as raised:
        write_text(tmp_path / "models" / "a.json", "")
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)
