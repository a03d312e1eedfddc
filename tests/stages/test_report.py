"""The report's head: the commit and experiment it comes from, and pages of MLflow."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.tracking.runs import StageRun
from stages import report


def git(*arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *name, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_of(parent_id: str, *, reached: bool = True) -> StageRun:
    """A stand-in for the stage's run in MLflow."""
    attempt = lambda action: reached and action()  # noqa: E731
    return SimpleNamespace(parent_id=parent_id, attempt=attempt)  # type: ignore[return-value]


@pytest.fixture
def commit(tmp_path, monkeypatch) -> str:
    """The only commit of a repository, in whose folder the test runs."""
    monkeypatch.chdir(tmp_path)
    for variable in ("DVC_EXP_BASELINE_REV", "DVC_EXP_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("params.yaml", "dvc.lock", "metrics/evaluate.json", "pipeline/config.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("old")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return git("rev-parse", "HEAD")


def test_what_stages_write_is_no_uncommitted_change(commit):
    for name in ("dvc.lock", "metrics/evaluate.json"):
        Path(name).write_text("new")
    origin = report.origin_of(run_of(""))
    assert commit.startswith(origin.commit)
    assert len(origin.commit) < 12
    assert (origin.changed, origin.experiment, origin.links) == ([], "", {})
    assert origin.written.utcoffset().total_seconds() == 0
    Path("pipeline/config.py").write_text("new")
    git("add", "pipeline")  # as DVC does it in a temporary folder
    Path("params.yaml").write_text("new")
    assert report.origin_of(run_of("")).changed == ["params.yaml", "pipeline/config.py"]


def test_an_experiment_is_named_with_the_commit_it_started_from(commit, monkeypatch):
    Path("params.yaml").write_text("new")
    git("commit", "-qam", "second")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", commit)
    monkeypatch.setenv("DVC_EXP_NAME", "gamma-5")
    origin = report.origin_of(run_of(""))
    assert commit.startswith(origin.commit)
    assert (origin.experiment, origin.changed) == ("gamma-5", ["params.yaml"])


def test_without_git_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    origin = report.origin_of(run_of(""))
    assert (origin.commit, origin.changed) == ("", [])


def test_links_lead_to_mlflow_where_it_was_reached(commit, monkeypatch):
    monkeypatch.setattr(report, "experiment_id", lambda: "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server:1")
    links = report.origin_of(run_of("abc")).links
    assert links["this experiment"].startswith("http://server:1/#/experiments/7/runs/abc?")
    assert links["all runs"].startswith("http://server:1/#/experiments/7/runs?")
    assert report.origin_of(run_of("abc", reached=False)).links == {}
