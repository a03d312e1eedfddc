"""Writing files: whole, or as they were."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.infra.atomic_io import write_atomically, write_text


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
        monkeypatch.setattr("pipeline.infra.atomic_io.write_through", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        write_text(path, "new")
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "metrics [1].json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".{path.name}.{dead.pid}.tmp").write_text("half")
    others = {tmp_path / f".{path.name}.{os.getppid()}.tmp", tmp_path / f".other.json.{dead.pid}.tmp"}
    for other in others:  # of a living process, and of another file
        other.write_text("half")
    write_atomically(path, b"whole")
    assert set(tmp_path.iterdir()) == {path, *others}
    assert path.read_bytes() == b"whole"


def test_two_processes_may_write_the_same_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.infra.atomic_io import write_atomically\n"
        "for _ in range(200): write_atomically(Path(sys.argv[1]), bytes([int(sys.argv[2])]) * 5000)"
    )
    path = tmp_path / "a.json"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=Path(__file__).parents[2])
        for n in (1, 2)
    ]
    seen = set()
    while any(process.poll() is None for process in both):
        if path.exists():
            seen.add(path.read_bytes())
    assert [process.returncode for process in both] == [0, 0]
    assert seen <= {bytes([n]) * 5000 for n in (1, 2)}
    assert list(tmp_path.iterdir()) == [path]


def test_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "models").write_text("")
    with pytest.raises(OSError, match="models") as raised:
        write_text(tmp_path / "models" / "a.json", "")
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)
