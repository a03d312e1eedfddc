"""What someone who sweeps gamma finds afterwards: in MLflow, in `dvc exp show`, in `dvc metrics diff`.

On fresh copies of the repository with tiny parameters; gammas by a queue with two workers on a store
that does not exist yet, then in temporary folders.
"""

import csv
import io
import json
import subprocess
import time

import pytest
from repository_copy import TINY, Copy, make_copy

pytestmark = pytest.mark.sweep
GAMMAS = (1, 5, 10)
HEADLINE = {
    "accuracy", "full_accuracy", "blocks_mean", "mflops_mean", "flops_saved", "unique_policies",
    "baseline.accuracy", "sole.8.accuracy", "static.first_3.accuracy", "pretrain.accuracy",
    "curriculum.accuracy", "finetune.accuracy", "data.train_images", "finetune.seconds",
}  # fmt: skip
LIST_RUNS = """
import json, mlflow
from mlflow import MlflowClient
client = MlflowClient('sqlite:///mlflow.db')
mlflow.set_tracking_uri('sqlite:///mlflow.db')
(experiment,) = [e for e in client.search_experiments() if e.name == 'blockdrop']
def files(run, path=None):
    for item in client.list_artifacts(run, path):
        yield from (files(run, item.path) if item.is_dir else [item.path])
rows = []
for run in client.search_runs([experiment.experiment_id], max_results=1000):
    run_id = run.info.run_id
    parent = run.data.tags.get('mlflow.parentRunId')
    paths = [] if parent else list(files(run_id))
    sizes = {}
    for path in paths:
        local = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path)
        sizes[path] = len(open(local, 'rb').read())
    rows.append(dict(id=run_id, name=run.info.run_name, status=run.info.status, parent=parent,
        tags=run.data.tags, params=run.data.params, metrics=run.data.metrics, artifacts=sizes,
        models=[m.model_id for m in run.outputs.model_outputs] if run.outputs else [],
        datasets=[d.dataset.digest for d in run.inputs.dataset_inputs] if run.inputs else []))
print('RUNS' + json.dumps(rows))
"""


def runs_of(copy: Copy) -> list[dict]:
    return json.loads(copy.python(LIST_RUNS).split("RUNS")[1])


def sync(copy: Copy) -> str:
    return copy.run("python", "-m", "tools.sync")


def wait_for_queue(copy: Copy) -> None:
    deadline = time.monotonic() + 1200
    while True:
        status = copy.run("dvc", "queue", "status")
        assert "Failed" not in status, status
        if not {"Queued", "Running"} & set(status.split()):
            return
        if (
            "0 active, 0 idle" in status
        ):  # a worker of DVC 3.67 dies now and then between two experiments
            copy.run("dvc", "queue", "start", "-j", "2")
        assert time.monotonic() < deadline, status
        time.sleep(2)


def check(runs: list[dict], names: dict[str, int]) -> None:
    """One finished parent with everything for each name; every other run is nested under one."""
    parents = {run["name"]: run for run in runs if run["parent"] is None}
    assert sorted(parents) == sorted(names)
    assert {run["status"] for run in runs} == {"FINISHED"}
    ids = {run["id"] for run in parents.values()}
    assert all(run["parent"] in ids for run in runs if run["parent"] is not None)
    for name, gamma in names.items():
        parent = parents[name]
        assert parent["params"]["gamma"] == str(gamma)
        assert len(parent["params"]) > 60
        assert set(parent["metrics"]) >= HEADLINE
        assert "finetune/validation_accuracy" in parent["metrics"]
        assert all(size > 0 for size in parent["artifacts"].values())
        assert set(parent["artifacts"]) >= {
            "params.yaml", "dvc.lock", "report/report.html", "report/report.md", "report/trade_off.png",
            "plots/evaluate/policy.png", "plots/evaluate/policies_by_class.png",
            "plots/evaluate/easy_and_hard.png", "plots/evaluate/learning_curves.png",
        }  # fmt: skip
        assert len(parent["models"]) == 1
        assert len(parent["datasets"]) == 1
        assert {"git.commit", "dvc.baseline", "dvc.md5.models/finetune"} <= set(parent["tags"])
        stages = [run["name"] for run in runs if run["parent"] == parent["id"]]
        assert len(stages) == len(set(stages))
        assert {"finetune", "evaluate", "report"} <= set(stages)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Copy:
    static = {"rules": ["first"], "num_kept": [3]}
    repository = make_copy(tmp_path_factory.mktemp("queue"), changes=TINY | {"static": static})
    copy = Copy(repository.folder, tracking=True)
    for gamma in GAMMAS:
        copy.run("dvc", "exp", "run", "--queue", "-n", f"gamma-{gamma}", "-S", f"gamma={gamma}")
    copy.run("dvc", "queue", "start", "-j", "2")
    wait_for_queue(copy)
    sync(copy)
    return copy


def test_queued_experiments_have_one_whole_parent_each(swept):
    check(runs_of(swept), {f"gamma-{gamma}": gamma for gamma in GAMMAS})


def test_syncing_again_changes_nothing(swept):
    before = runs_of(swept)
    output = sync(swept)
    assert "logged" not in output.replace("work tree: not logged", "")
    assert runs_of(swept) == before


def test_an_applied_experiment_is_the_one_it_was(swept):
    before = len(runs_of(swept))
    swept.run("dvc", "exp", "apply", "gamma-5")
    output = sync(swept)
    assert "gamma-5 *" in output
    assert len(runs_of(swept)) == before
    swept.run("git", "reset", "-q", "--hard")
    swept.run("git", "clean", "-fdq", "-e", "mlflow.db*", "-e", "mlartifacts")


def test_table_of_experiments_has_named_columns_without_holes(swept):
    table = list(csv.DictReader(io.StringIO(swept.run("dvc", "exp", "show", "--csv"))))
    rows = [row for row in table if row["Experiment"].startswith("gamma-")]
    assert len(rows) == len(GAMMAS)
    columns = ["accuracy", "blocks_mean", "flops_mean", "gamma", "baseline.accuracy", "sole.8.accuracy"]
    for row in rows:
        assert all(row[name] not in ("", "-", "!") for name in columns), row
        assert "!" not in row.values()
        assert not any(".json:" in name for name in row), list(row)  # two files with one name


def test_differences_between_two_gammas_are_numbers(swept):
    differences = json.loads(swept.run("dvc", "metrics", "diff", "gamma-1", "gamma-10", "--json"))
    blocks = differences["metrics/evaluate.json"]["blocks_mean"]
    assert blocks["new"] - blocks["old"] == pytest.approx(blocks["diff"])
    shown = json.loads(swept.run("dvc", "plots", "diff", "gamma-1", "gamma-10", "--json"))
    assert not shown.get("errors"), shown["errors"]
    assert {"accuracy", "reward", "blocks", "trade-off"} <= set(shown["data"])
    curves = shown["data"]["accuracy"][0]
    assert set(curves["revisions"]) == {"gamma-1", "gamma-10"}


def test_front_of_the_gammas(swept):
    output = swept.run("python", "-m", "tools.front", "--out", "front.png")
    assert "3 experiments" in output
    assert (swept.folder / "front.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((swept.folder / "front.csv").open()))
    assert [float(row["gamma"]) for row in rows] == list(GAMMAS)


def test_a_colleagues_experiments_arrive_with_all_of_it(swept, tmp_path):
    """`dvc exp push` and `pull` between two clones: no stage runs at the colleague's."""
    bare, remote, other = tmp_path / "bare.git", tmp_path / "remote", tmp_path / "other"
    swept.run("git", "clone", "-q", "--bare", ".", str(bare))
    swept.run("git", "remote", "add", "shared", str(bare))
    swept.run("dvc", "remote", "add", "--local", "-d", "store", str(remote))
    swept.run("dvc", "exp", "push", "shared", "gamma-1", "gamma-5")
    subprocess.run(["git", "clone", "-q", str(bare), str(other)], check=True)
    colleague = Copy(other, tracking=True)
    colleague.run("dvc", "remote", "add", "--local", "-d", "store", str(remote))
    colleague.run("dvc", "exp", "pull", "origin", "gamma-1", "gamma-5")
    sync(colleague)
    runs = runs_of(colleague)
    assert sorted(run["name"] for run in runs) == ["gamma-1", "gamma-5"]
    for run in runs:
        assert set(run["metrics"]) >= HEADLINE
        assert "report/report.html" in run["artifacts"]
        assert len(run["models"]) == 1


def test_temporary_experiments_on_an_empty_store(swept):
    for path in [*swept.folder.glob("mlflow.db*")]:
        path.unlink()
    for gamma in GAMMAS:  # from the cache: no stage runs any code
        swept.run("dvc", "exp", "run", "--temp", "-n", f"temp-{gamma}", "-S", f"gamma={gamma}")
    swept.run("dvc", "exp", "run", "--temp", "-n", "temp-7", "-S", "gamma=7")
    sync(swept)
    runs = runs_of(swept)
    names = {f"{kind}-{gamma}" for kind in ("gamma", "temp") for gamma in GAMMAS} | {"temp-7"}
    assert {run["name"] for run in runs if run["parent"] is None} == names
    assert {run["status"] for run in runs} == {"FINISHED"}
    whole = [run for run in runs if run["parent"] is None]
    assert all(set(run["metrics"]) >= HEADLINE for run in whole)
    assert all("report/report.html" in run["artifacts"] for run in whole)
