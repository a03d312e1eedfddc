"""A team's server: PostgreSQL, artifacts in S3, four people who log at once, and it is killed meanwhile.

Each of the four has a clone, so they have no lock in common. DVC runs their stages, which log as
trainings do.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import experiment_files
import mlflow
import numpy as np
import pytest
import servers
import yaml
from builders import TRACKING_VARIABLES, enter_project
from mlflow import MlflowClient
from mlflow.entities import Run
from repository_copy import Copy
from sandbox import ROOT, environment
from waiting import wait_for

from pipeline.tracking import runs
from pipeline.tracking.runs import stage_run

pytestmark = pytest.mark.slow
GAMMAS = (1, 2, 5, 10)
AFTER = 3  # epochs after the server was killed
STAGE = """
import csv, itertools, shutil, sys, time
from pathlib import Path
import yaml
from pipeline import config
from pipeline.tracking import runs
runs.FLUSH_SECONDS = runs.FLUSH_SHARE = 0.0  # a call for every epoch
runs.TIMEOUT = 100.0  # the machine may be busy
stage, signs = sys.argv[1], Path(sys.argv[2])
params = dict(config.flatten(yaml.safe_load(Path("params.yaml").read_text())))
made = Path("made")
if stage == "evaluate":
    while not (signs / "back").exists():
        time.sleep(0.1)
with runs.stage_run(stage, params) as run:
    if stage == "evaluate":
        run.log_metrics({"accuracy": 0.9})
        shutil.copyfile(made / "metrics/evaluate.json", "metrics/evaluate.json")
        shutil.copytree(made / "report", "report")
    else:
        rows, left = [], None
        for epoch in itertools.count(1):
            rows.append({"epoch": epoch, "validation_accuracy": 1 - 1 / epoch})
            run.log_metrics(rows[-1], step=epoch)
            (signs / f"{params['gamma']}-{epoch}").touch()
            if left is None and (signs / "killed").exists():
                left = AFTER
            elif left is not None:
                left -= 1
            if left == 0:
                break
            time.sleep(0.02)
        Path("plots").mkdir(exist_ok=True)
        with open("plots/finetune.csv", "w") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        shutil.copytree(made / "models/finetune", "models/finetune")
        shutil.copytree(made / "prepared", "data/prepared")
""".replace("AFTER", str(AFTER))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def database() -> Iterator[servers.Server]:
    with servers.postgres() as server:
        yield server


@pytest.fixture(scope="module")
def server(home, database) -> Iterator[servers.Server]:
    with servers.s3(home) as store:
        options = (
            "--workers", "2", "--backend-store-uri", servers.postgres_uri(database),
            "--artifacts-destination", f"s3://{servers.BUCKET}/mlflow", "--serve-artifacts",
        )  # fmt: skip
        with servers.mlflow(home, *options, env=servers.s3_environment(store)) as server:
            yield server


@pytest.fixture(autouse=True)
def _logged_to_the_server(server, tmp_path, monkeypatch):
    enter_project(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setattr(runs, "TIMEOUT", 100.0)  # the machine may be busy
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(runs, "FLUSH_SHARE", 0.0)


@pytest.fixture
def client(server) -> MlflowClient:
    return MlflowClient(server.address)


def make_project(folder: Path, signs: Path) -> None:
    """DVC's and Git's, with two stages that copy a result which is there already."""
    (folder / "made").mkdir()
    experiment_files.write(folder / "made")
    (folder / "made/prepared").mkdir()
    np.save(folder / "made/prepared/test_images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for name in ("params.yaml", "metrics/prepare.json", "metrics/baseline.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "made" / name).rename(folder / name)
    (folder / "made/dvc.lock").unlink()
    (folder / "stage.py").write_text(STAGE)
    params = list(yaml.safe_load((folder / "params.yaml").read_text()))
    stages = {
        "finetune": {"cmd": f"python stage.py finetune {signs}", "deps": ["stage.py", "made"],
                     "params": params,
                     "outs": ["models/finetune", "data/prepared", "plots/finetune.csv"]},
        "evaluate": {"cmd": f"python stage.py evaluate {signs}", "deps": ["models/finetune"],
                     "outs": ["report"], "metrics": [{"metrics/evaluate.json": {"cache": False}}]},
    }  # fmt: skip
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def run(folder: Path, *command: str) -> str:
    return Copy(folder, tracking=True).run(*command)


def make_clones(home: Path, signs: Path, count: int) -> list[Path]:
    origin = home / "origin"
    origin.mkdir()
    make_project(origin, signs)
    for command in ("git init -qb main", "dvc init -q", "git add -A", "git config user.name test",
                    "git config user.email test@example.org", "git commit -qm project"):  # fmt: skip
        run(origin, *command.split())
    clones = [home / f"clone-{number}" for number in range(count)]
    for clone in clones:
        run(origin, "git", "clone", "-q", str(origin), str(clone))
        run(clone, "git", "config", "user.name", "test")
        run(clone, "git", "config", "user.email", "test@example.org")
    return clones


def start(server: servers.Server, folder: Path, *command: str) -> subprocess.Popen[str]:
    variables = environment(tracking=True) | {
        "MLFLOW_TRACKING_URI": server.address,
        "PYTHONPATH": str(ROOT),
        "DVC_ROOT": str(folder),
    }
    for name in set(TRACKING_VARIABLES) - {"MLFLOW_TRACKING_URI"}:
        variables.pop(name, None)
    return subprocess.Popen(
        command, cwd=folder, env=variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    failed = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failed, "\n\n".join(failed)
    return outputs


def points(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def runs_of(client: MlflowClient, tag: str) -> dict[str, Run]:
    """The four experiments' runs of a role, or of a stage, by gamma."""
    (experiment,) = client.search_experiments(filter_string="name = 'blockdrop'")
    found = client.search_runs([experiment.experiment_id], f"tags.`blockdrop.{tag}")
    assert len(found) == len(GAMMAS)
    return {run.data.params["gamma"]: run for run in found}


def curve_of(clone: Path) -> list[tuple[int, float]]:
    rows = [line.split(",") for line in (clone / "plots/finetune.csv").read_text().split()[1:]]
    return [(int(epoch), float(accuracy)) for epoch, accuracy in rows]


def check_whole(client: MlflowClient, parent: Run, curve: list[tuple[int, float]], folder: Path) -> None:
    """A parent run has all of its experiment, once."""
    run_id = parent.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:")  # S3, through the server
    assert points(client, run_id, "finetune/validation_accuracy") == curve
    assert points(client, run_id, "accuracy") == [(0, 0.9)]
    assert parent.data.tags["dvc.revision"]
    picture = client.download_artifacts(run_id, "report/policy.png", str(folder))
    assert Path(picture).read_bytes() == experiment_files.PNG
    (output,) = parent.outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert len(model.predict(np.zeros((3, 8, 8, 3), np.uint8))) == 3


def test_four_clones_whose_server_is_killed_are_whole_after_their_syncs(server, client, tmp_path):
    signs = tmp_path / "signs"
    signs.mkdir()
    clones = make_clones(tmp_path, signs, len(GAMMAS))
    processes = [
        start(server, clone, "dvc", "exp", "run", "-n", f"gamma-{gamma}", "-S", f"gamma={gamma}")
        for clone, gamma in zip(clones, GAMMAS, strict=True)
    ]
    with servers.ended(processes):
        wait_for(lambda: all((signs / f"{gamma}-5").exists() for gamma in GAMMAS), 600)
        server.kill()
        (signs / "killed").touch()
        wait_for(lambda: all((clone / "models/finetune").exists() for clone in clones), 300)
        server.start()
        (signs / "back").touch()
        outputs = finish(processes)
    for output in outputs:
        assert output.count("MLflow can't be reached") == output.count("going on without it") == 1
        assert "Traceback" not in output
    curves = {str(gamma): curve_of(clone) for clone, gamma in zip(clones, GAMMAS, strict=True)}
    for gamma, training in runs_of(client, "stage` = 'finetune'").items():
        logged = points(client, training.info.run_id, "validation_accuracy")
        assert logged == curves[gamma][: len(logged)]
        assert 5 <= len(logged) <= len(curves[gamma]) - AFTER
        assert training.info.status != "FINISHED"
    syncs = [start(server, clone, sys.executable, "-m", "tools.sync") for clone in clones]
    with servers.ended(syncs):
        assert all(f"gamma-{g}: logged" in o for g, o in zip(GAMMAS, finish(syncs), strict=True))
    parents = runs_of(client, "role` = 'parent'")
    assert parents.keys() == curves.keys()
    for gamma, parent in parents.items():
        check_whole(client, parent, curves[gamma], tmp_path)
    for stage in ("finetune", "evaluate"):
        for gamma, child in runs_of(client, f"stage` = '{stage}'").items():
            assert child.data.tags["mlflow.parentRunId"] == parents[gamma].info.run_id
            assert child.info.status == "FINISHED"
            if stage == "finetune":
                assert points(client, child.info.run_id, "validation_accuracy") == curves[gamma]


def test_name_longer_than_postgresql_takes_is_cut(client, tmp_path, monkeypatch, capsys):
    """A parameter that holds a long path is in the name of what `dvc repro` runs."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "long names")
    name = "main-1234567 data.folder=" + "x" * 300
    monkeypatch.setenv("DVC_EXP_NAME", name)
    with stage_run("pretrain", {"gamma": 7}) as run:
        pass
    assert capsys.readouterr().err == ""
    parent = client.get_run(run.parent_id)
    assert name.startswith(parent.info.run_name.removesuffix("..."))
    assert parent.data.tags["dvc.experiment"] == name


def test_database_that_is_killed_costs_a_stage_its_curve_and_the_next_one_nothing(
    client, database, monkeypatch, capsys
):
    """PostgreSQL recovers, and MLflow's server connects to it again."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "database")
    with stage_run("pretrain", {"gamma": 7}) as first:
        first.log_metrics({"loss": 1.0}, step=1)
        database.kill()
        for step in (2, 3):
            first.log_metrics({"loss": 1.0}, step=step)
    message = capsys.readouterr().err
    assert message.count("\n") == message.count("MLflow can't be reached") == 1
    assert servers.PASSWORD not in message
    database.start()
    with stage_run("curriculum", {"gamma": 7}) as second:
        second.log_metrics({"loss": 1.0}, step=1)
    assert capsys.readouterr().err == ""
    assert second.parent_id == first.parent_id
    assert points(client, first.run_id, "loss") == points(client, second.run_id, "loss") == [(1, 1.0)]
