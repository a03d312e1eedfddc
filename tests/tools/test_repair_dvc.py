"""Files that a killed DVC left corrupted are moved aside, and no others."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from fuzzing import bounded

from tools import repair_dvc

ROOT = Path(__file__).parents[2]
WHOLE = (ROOT / "dvc.lock").read_text()
ROWS = '{"write": {}, "read": {}}'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["repair_dvc"])
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


def test_whole_and_missing_files_are_left(folder, capsys):
    repair_dvc.main()
    (folder / "dvc.lock").write_text(WHOLE)
    (folder / ".dvc/tmp/rwlock").write_text(ROWS)
    repair_dvc.main()
    assert (folder / "dvc.lock").read_text() == WHOLE
    assert (folder / ".dvc/tmp/rwlock").read_text() == ROWS
    assert capsys.readouterr().out == ""


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_results_that_the_last_commit_lacks_are_named_and_nothing_else(folder):
    assert repair_dvc.uncommitted(folder) == []  # no Git repository
    for name in ("params.yaml", "metrics/evaluate.json", "metrics/old.json", "models/.gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    git(folder, "init", "-q")
    git(folder, "add", "params.yaml", "metrics", "models")
    git(folder, "commit", "-qm", "first")
    assert repair_dvc.uncommitted(folder) == []
    (folder / "dvc.lock").touch()  # not tracked yet
    (folder / "data").mkdir()
    for name in ("data/my photo.png", "notes.txt"):  # the user's
        (folder / name).touch()
    assert repair_dvc.uncommitted(folder) == ["dvc.lock"]
    (folder / "metrics/evaluate.json").write_text("{}")
    (folder / "metrics/old.json").unlink()
    (folder / "params.yaml").write_text("gamma: 5")
    git(folder, "add", "params.yaml")  # staged is not committed
    assert repair_dvc.uncommitted(folder) == ["params.yaml", "dvc.lock", "metrics"]


HEAD = "schema: '2.0'\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{HEAD}stages:\n  check:\n    cmd",
        f"{HEAD}stages:\n  check:\n    cmd: python\n    outs:\n    - path: models\n      md5: 1234",
        f"{HEAD}stages:\n  check:\n    cmd: [",
        "\0",
    ],
)
def test_corrupted_dvc_lock_is_moved(folder, text, capsys):
    (folder / "dvc.lock").write_text(text)
    repair_dvc.main()
    assert not (folder / "dvc.lock").exists()
    assert (folder / "dvc.lock.corrupted").read_text() == text
    assert "dvc.lock was left corrupted when DVC was killed" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"write": {"/a'])
def test_corrupted_list_of_locks_is_moved(folder, text):
    (folder / ".dvc/tmp/rwlock").write_text(text)
    repair_dvc.main()
    assert not (folder / ".dvc/tmp/rwlock").exists()


def test_unfinished_merge_is_left(folder):
    text = WHOLE.replace("stages:", "<<<<<<< HEAD\nstages:\n=======\nstages:\n>>>>>>> other", 1)
    (folder / "dvc.lock").write_text(text)
    repair_dvc.main()
    assert (folder / "dvc.lock").read_text() == text


def test_dvc_reads_what_is_left_of_a_dvc_lock_cut_at_any_byte(folder):
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "params.yaml", folder)
    with Repo.init(no_scm=True, force=True) as repo:
        for end in range(0, len(WHOLE), 997):
            (folder / "dvc.lock").write_text(WHOLE[:end])
            for name in repair_dvc.corrupted(folder):
                name.unlink()
            repo._reset()
            assert {out.stage.name for out in repo.index.outs} >= {"prepare", "baseline"}, end


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml", "params.yaml"])
@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_link_to_a_device_or_a_pipe_is_refused(folder, name, target):
    os.mkfifo(folder / "pipe")
    (folder / name).symlink_to(folder / target)
    with bounded(), pytest.raises(SystemExit, match=f"{name} is no plain file"):
        repair_dvc.main()
