"""Resume points: whole at any moment, found by what the training depends on."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from damage import Hostile
from filelock import FileLock, Timeout
from fuzzing import bounded

from pipeline.infra.resume import (
    KEEP_FINISHED,
    KEEP_INTERRUPTED,
    ResumePoint,
    digest_of_files,
    key_of,
    project_root,
    tidy,
)

OLD = {"epoch": 1, "weights": {"a": torch.arange(3.0)}, "metrics": [0.5, None]}
NEW = {"epoch": 2}


@pytest.fixture
def point(tmp_path: Path) -> ResumePoint:
    return ResumePoint(path=tmp_path / ".resume" / "pretrain-abc.pt")


def test_last_state_comes_back_and_the_one_before_is_kept(point, capsys):
    assert point.load() is None
    point.save({"epoch": 0})
    point.save(OLD)
    assert torch.equal(point.load()["weights"]["a"], OLD["weights"]["a"])
    assert point.load()["metrics"] == [0.5, None]
    point.save(NEW)
    assert point.load() == NEW
    assert set(point.path.parent.iterdir()) == {point.path, point.previous}
    point.path.unlink()
    assert point.load()["epoch"] == OLD["epoch"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("byte", [0, -1])
def test_one_flipped_bit_is_seen_and_the_state_before_is_taken(point, byte, capsys):
    point.save(OLD)
    point.save(NEW)
    content = bytearray(point.path.read_bytes())
    content[byte] ^= 1
    point.path.write_bytes(content)
    assert point.load()["epoch"] == OLD["epoch"]
    assert f"{point.path} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_link_to_a_device_or_a_pipe_is_not_waited_for(point, tmp_path, target, capsys):
    os.mkfifo(tmp_path / "pipe")
    point.path.parent.mkdir()
    for path in (point.path, point.path.with_suffix(".fresh.pt")):
        path.symlink_to(tmp_path / target)
    with bounded():
        assert point.load() is None
        assert f"{point.path} can't be read (Not a plain file)" in capsys.readouterr().out
        point.save(NEW)
    assert point.load() == NEW


def half(path: Path, content: bytes) -> None:
    path.write_bytes(content[:10])
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("write", "reason"),
    [(lambda path, content: path.write_bytes(content[:-1]), "other bytes"), (half, "No space left")],
)
def test_save_that_fails_names_the_file_and_keeps_the_old_state(point, monkeypatch, write, reason):
    point.save(OLD)
    monkeypatch.setattr("pipeline.infra.resume.write_through", write)
    with pytest.raises(OSError, match=reason) as raised:
        point.save(NEW)
    assert raised.value.filename == str(point.path)
    assert point.load()["epoch"] == OLD["epoch"]
    assert list(point.path.parent.iterdir()) == [point.path]


def test_killed_between_two_renamings_the_old_state_is_there(point, monkeypatch):
    point.save(OLD)
    real, calls = Path.replace, []

    def die(path: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            point.save(NEW)
    assert calls == [point.previous, point.path]
    assert point.load()["epoch"] == OLD["epoch"]
    point.save(NEW)  # what was left over is in nobody's way
    assert point.load() == NEW


def test_finished_state_takes_the_place_of_those_on_the_way(point):
    point.save(OLD)
    point.save(NEW)
    assert point.load_finished() is None
    point.finish()
    assert point.load_finished() == NEW
    assert point.load() is None
    assert list(point.path.parent.iterdir()) == [point.finished]


def test_finish_that_fails_names_the_file_and_keeps_the_state(point, monkeypatch):
    point.save(NEW)

    def fail(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output") as raised:
            point.finish()
    assert raised.value.filename == str(point.finished)
    assert point.load() == NEW


def test_old_results_and_very_old_states_are_tidied_away(point):
    other = ResumePoint(path=point.path.with_name("finetune-abc.pt"))
    other.save(NEW)
    other.finish()
    point.save(OLD)
    now = time.time()
    tidy(point.path.parent, now=now + KEEP_FINISHED / 2)
    assert set(point.path.parent.iterdir()) == {point.path, other.finished}
    tidy(point.path.parent, now=now + KEEP_FINISHED + 60)
    assert list(point.path.parent.iterdir()) == [point.path]
    tidy(point.path.parent, now=now + KEEP_INTERRUPTED + 60)
    assert list(point.path.parent.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0, 0.9])
def test_damaged_state_is_named_and_the_training_starts_over(point, capsys, fraction):
    point.save(OLD)
    content = point.path.read_bytes()
    point.path.write_bytes(content[: int(fraction * len(content))])
    assert point.load() is None
    output = capsys.readouterr().out
    assert str(point.path) in output
    assert "starting from the first epoch" in output


def can_lock(point: ResumePoint) -> bool:
    lock = FileLock(point.path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def test_locked_training_is_closed_to_others_until_it_ends(point, capsys):
    with point.lock():
        assert not can_lock(point)
    assert can_lock(point)
    with pytest.raises(KeyboardInterrupt), point.lock():
        raise KeyboardInterrupt
    assert can_lock(point)
    assert capsys.readouterr().out == ""


def test_lock_of_another_process_is_waited_for_with_a_message(point, capsys):
    point.path.parent.mkdir()
    locked = threading.Event()

    def hold() -> None:
        with FileLock(point.path.with_suffix(".lock")):
            locked.set()
            time.sleep(0.2)

    other = threading.Thread(target=hold)
    other.start()
    locked.wait()
    started = time.monotonic()
    with point.lock():
        assert time.monotonic() - started > 0.1
    other.join()
    output = capsys.readouterr().out
    assert "waiting: another process is at the same training" in output
    assert point.path.stem in output


def test_state_that_would_run_code_is_not_opened(point, tmp_path):
    point.save({"epoch": Hostile(tmp_path / "ran")})
    assert point.load() is None
    assert not (tmp_path / "ran").exists()


def test_key_differs_by_every_ingredient_in_any_order():
    key = key_of(seed=0, params={"lr": 0.1, "epochs": 2})
    assert key.isalnum()  # it stands in a file's name
    assert key == key_of(params={"epochs": 2, "lr": 0.1}, seed=0)
    others = [
        key_of(seed=1, params={"lr": 0.1, "epochs": 2}),
        key_of(seed=0, params={"lr": 0.2, "epochs": 2}),
        key_of(seed=0, params={"rl": 0.1, "epochs": 2}),
        key_of(seed=0, params={"lr": 0.1, "epochs": 2}, data=Path("x")),
        key_of(seed=0),
    ]
    assert len({key, *others}) == 6


def test_digest_of_files_follows_contents_and_names_and_no_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    before = digest_of_files([first, second])
    assert digest_of_files([second, first]) == before
    second.write_bytes(b"3")
    assert digest_of_files([first, second]) != before
    second.write_bytes(b"2")
    assert digest_of_files([first, second.rename(tmp_path / "c")]) != before


@pytest.mark.parametrize(
    ("told", "marks", "root"),
    [
        (".", ("inner/.dvc/",), "."),
        (None, (".dvc/", "inner/.dvc/"), "inner"),
        (None, (".dvc/", "inner/.dvc"), "."),  # a file is no mark
        (None, (), "inner/a"),
    ],
    ids=["DVC tells it", "nearest mark", "file", "no mark"],
)
def test_root_of_the_project(tmp_path, monkeypatch, told, marks, root):
    (tmp_path / "inner/a").mkdir(parents=True)
    for mark in marks:
        make = Path.mkdir if mark.endswith("/") else Path.touch
        make(tmp_path / mark)
    monkeypatch.chdir(tmp_path / "inner/a")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if told:
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / told))
    assert project_root() == tmp_path / root
