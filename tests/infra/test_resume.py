"""Resume points: whole at any moment, found by what the training depends on."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
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


def test_state_comes_back(point):
    point.save(OLD)
    state = point.load()
    assert torch.equal(state["weights"]["a"], OLD["weights"]["a"])
    assert state["epoch"] == 1
    assert state["metrics"] == [0.5, None]


def test_later_state_replaces_the_earlier_which_is_kept_beside_it(point):
    point.save({"epoch": 0})
    point.save(OLD)
    point.save(NEW)
    assert point.load() == NEW
    assert set(point.path.parent.iterdir()) == {point.path, point.previous}
    point.path.unlink()
    assert point.load()["epoch"] == OLD["epoch"]


@pytest.mark.parametrize("byte", [0, 40, -1])
def test_one_flipped_bit_is_seen_and_the_state_before_is_taken(point, byte, capsys):
    point.save(OLD)
    point.save(NEW)
    content = bytearray(point.path.read_bytes())
    content[byte] ^= 1
    point.path.write_bytes(content)
    assert point.load()["epoch"] == OLD["epoch"]
    assert f"{point.path} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_point_that_is_a_link_to_a_device_or_a_pipe_is_not_waited_for(point, tmp_path, target, capsys):
    os.mkfifo(tmp_path / "pipe")
    point.path.parent.mkdir()
    for path in (point.path, point.path.with_suffix(".fresh.pt")):
        path.symlink_to(tmp_path / target)
    with bounded():
        assert point.load() is None
        assert f"{point.path} can't be read (Not a plain file)" in capsys.readouterr().out
        point.save(NEW)
    assert point.load() == NEW


def test_state_that_the_disk_gives_back_otherwise_is_not_taken(point, monkeypatch):
    point.save(OLD)

    def spoil(path: Path, content: bytes) -> None:
        path.write_bytes(content[:-1])

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.infra.resume.write_through", spoil)
        with pytest.raises(OSError, match="other bytes") as raised:
            point.save(NEW)
    assert raised.value.filename == str(point.path)
    assert point.load()["epoch"] == OLD["epoch"]
    assert list(point.path.parent.iterdir()) == [point.path]


def test_killed_between_the_two_renamings_the_old_state_is_there(point, monkeypatch):
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


def test_without_a_state_there_is_none_and_no_message(point, capsys):
    assert point.load() is None
    assert capsys.readouterr().out == ""


def test_failed_save_keeps_the_old_state_and_leaves_no_half_file(point, monkeypatch):
    def fail(path, content):
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    point.save(OLD)
    monkeypatch.setattr("pipeline.infra.resume.write_through", fail)
    with pytest.raises(OSError, match="No space left"):
        point.save(NEW)
    assert point.load()["epoch"] == 1
    assert list(point.path.parent.iterdir()) == [point.path]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
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
    assert capsys.readouterr().out == ""


def test_locked_training_that_fails_is_open_again(point):
    with pytest.raises(KeyboardInterrupt), point.lock():
        raise KeyboardInterrupt
    assert can_lock(point)


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


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return Path.mkdir, (self.ran,)


def test_state_that_would_run_code_is_not_opened(point, tmp_path):
    point.save({"epoch": Hostile(tmp_path / "ran")})
    assert point.load() is None
    assert not (tmp_path / "ran").exists()


def test_paths_differ_by_stage_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    paths = {ResumePoint.of(stage, key).path for stage in ("pretrain", "finetune") for key in "ab"}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {tmp_path / ".resume"}


def test_key_is_the_same_for_the_same_ingredients_in_any_order():
    assert key_of(seed=0, params={"lr": 0.1, "epochs": 2}) == key_of(
        params={"epochs": 2, "lr": 0.1}, seed=0
    )


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1, "params": {"lr": 0.1}},
        {"seed": 0, "params": {"lr": 0.2}},
        {"seed": 0, "params": {"rl": 0.1}},
        {"seed": 0, "params": {"lr": 0.1}, "data": "x"},
        {"seed": 0},
    ],
)
def test_key_differs_by_every_ingredient(other):
    assert key_of(**other) != key_of(seed=0, params={"lr": 0.1})


def test_key_may_stand_in_a_file_name():
    assert key_of(path=Path("a/b")).isalnum()


def test_digest_of_files_follows_their_contents_and_names_and_not_their_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    before = digest_of_files([first, second])
    assert digest_of_files([second, first]) == before
    second.write_bytes(b"3")
    assert digest_of_files([first, second]) != before
    second.write_bytes(b"2")
    assert digest_of_files([first, second.rename(tmp_path / "c")]) != before


def test_dvc_tells_the_root(tmp_path, monkeypatch):
    (tmp_path / "temporary" / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "temporary")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == tmp_path


def test_without_dvc_the_root_is_the_nearest_folder_with_its_mark(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / ".dvc").mkdir()
    inner = tmp_path / "inner"
    (inner / ".dvc").mkdir(parents=True)
    (inner / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(inner / "a" / "b")
    assert project_root() == inner


def test_file_of_the_name_is_no_mark(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / ".dvc").write_text("a file")
    monkeypatch.chdir(tmp_path / "inner")
    assert project_root() == tmp_path


def test_without_any_mark_the_root_is_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path
