"""DVC's remotes over SSH and S3: what one clone pushes another one pulls, experiments included."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from repository_copy import TINY, Copy, make_copy
from waiting import start, wait_for

pytestmark = pytest.mark.slow
BENCHMARK = {"batch_sizes": [4], "executors": ["masked"], "keep_ratios": [0.5, 1.0], "rounds": 5,
             "seconds": 10}  # fmt: skip
SHORT = TINY | {
    "pretrain": {"epochs": 1},
    "finetune": {"epochs": 2},
    "static": {"rules": ["first"], "num_kept": [3]},
    "benchmark": BENCHMARK,
}
LARGE = 64 * 2**20  # bytes, which take a while
PARENTS = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
(experiment,) = client.search_experiments(filter_string="name = 'blockdrop'")
runs = client.search_runs([experiment.experiment_id], "tags.`blockdrop.role` = 'parent'")
print("RUNS" + json.dumps([dict(name=run.info.run_name, status=run.info.status, tags=run.data.tags,
    metrics=run.data.metrics, models=len(run.outputs.model_outputs) if run.outputs else 0,
    artifacts=[item.path for item in client.list_artifacts(run.info.run_id)]) for run in runs]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("remotes")


@pytest.fixture(scope="module")
def ssh(home) -> Iterator[servers.Server]:
    with servers.ssh(home) as server:
        yield server


@pytest.fixture(scope="module")
def s3(home) -> Iterator[servers.Server]:
    with servers.s3(home) as server:
        yield server


@pytest.fixture(scope="module")
def first(home, ssh, s3) -> Copy:
    """A clone with an experiment, committed also as its result, and a bare Git remote."""
    folder = home / "first"
    folder.mkdir()
    copy = make_copy(folder, changes=SHORT)
    address = f"{servers.ssh_user()}@{servers.HOST}:{ssh.port}"
    for command in (
        f"dvc remote add -d over_ssh ssh://{address}{home}/store",
        f"dvc remote add over_s3 s3://{servers.BUCKET}/store",
        f"dvc remote modify over_s3 endpointurl {s3.address}",
        "git commit -qam remotes",
        f"git clone -q --bare . {home}/origin.git",
        f"git remote add origin {home}/origin.git",
        "dvc exp run -n gamma-5 -S gamma=5",
        "git add -A",
        "git commit -qm gamma-5",
        "git push -q origin main",
    ):
        copy.run(*command.split())
    for command in (  # to .dvc/config.local, which Git ignores
        f"dvc remote modify --local over_ssh keyfile {home}/user",
        "dvc remote modify --local over_s3 access_key_id team",
        "dvc remote modify --local over_s3 secret_access_key secret",
    ):
        copy.run(*command.split())
    return copy


def clone(first: Copy, home: Path, folder: Path, *, tracking: bool = False) -> Copy:
    origin = Copy(home / "origin.git")
    origin.run("git", "clone", "-q", str(origin.folder), str(folder))
    shutil.copyfile(first.folder / ".dvc/config.local", folder / ".dvc/config.local")
    return Copy(folder, tracking=tracking)


@pytest.mark.parametrize("remote", ["over_ssh", "over_s3"])
def test_outputs_that_one_clone_pushes_another_one_pulls(first, home, tmp_path, remote):
    first.run("dvc", "push", "-r", remote)
    second = clone(first, home, tmp_path / "second")
    second.run("dvc", "pull", "-r", remote)
    outs = first.outs(timed=True)
    assert {Path(name).parts[0] for name in outs} == {"data", "models", "metrics", "plots", "report"}
    assert second.outs(timed=True) == outs


def test_pulled_experiment_is_whole_in_mlflow_after_the_sync(first, home, tmp_path):
    first.run("dvc", "exp", "push", "origin", "gamma-5")
    second = clone(first, home, tmp_path / "second", tracking=True)
    second.run("dvc", "exp", "pull", "origin", "gamma-5")
    assert "gamma-5: logged" in second.run("python", "-m", "tools.sync")
    revision = first.run("git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/gamma-5")
    (parent,) = json.loads(second.python(PARENTS).split("RUNS")[1])
    assert (parent["name"], parent["status"], parent["models"]) == ("gamma-5", "FINISHED", 1)
    assert {"params.yaml", "dvc.lock", "report", "plots"} <= set(parent["artifacts"])
    assert parent["metrics"]["accuracy"] == first.metrics("evaluate")["accuracy"]
    assert "finetune/validation_accuracy" in parent["metrics"]
    assert parent["tags"]["dvc.revision"] == revision.strip()


def test_push_whose_server_is_killed_is_completed_by_the_next_one(tmp_path):
    project, second, store = Copy(tmp_path / "project"), Copy(tmp_path / "second"), tmp_path / "store"
    project.folder.mkdir()
    large = os.urandom(LARGE)
    (project.folder / "large").write_bytes(large)
    with servers.ssh(tmp_path) as server:
        address = f"ssh://{servers.ssh_user()}@{servers.HOST}:{server.port}{store}"
        for command in (
            "git init -q",
            "dvc init -q",
            "dvc add -q large",
            f"dvc remote add -d store {address}",
            f"dvc remote modify store keyfile {tmp_path}/user",
        ):
            project.run(*command.split())
        shutil.copytree(project.folder, second.folder)
        shutil.rmtree(second.folder / ".dvc/cache")
        (second.folder / "large").unlink()
        with servers.ended([start(project, "dvc", "push")]) as (push,):
            wait_for(lambda: any(file.stat().st_size for file in store.rglob("*.tmp")))
            server.kill()
            output, _ = push.communicate(timeout=120)
        assert push.returncode != 0
        assert "failed to push data to the cloud" in output
        assert not [file for file in store.rglob("*") if file.is_file() and file.suffix != ".tmp"]
        server.start()
        project.run("dvc", "push")
        second.run("dvc", "pull")
    assert (second.folder / "large").read_bytes() == large
