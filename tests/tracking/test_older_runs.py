"""Runs of older versions compare with today's, and are found again instead of doubled."""

import experiment_files
import pytest
from builders import enter_project
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from pipeline.tracking import dvc_results, experiment_runs, overview, view
from pipeline.tracking.identity import as_texts, experiment_key
from pipeline.tracking.older_runs import bring_up_to_date
from pipeline.tracking.runs import stage_run
from pipeline.tracking.store import keep_view, store

OLD = {"blockdrop.key": "0123", "blockdrop.process": "vm 1 2.0", "blockdrop.logged.curves": "45"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def client(home, monkeypatch) -> MlflowClient:
    enter_project(home, monkeypatch)
    with store() as (client, _):
        return client


def old_run(client: MlflowClient, *, params=None, metrics=None, **tags: str) -> str:
    """A run as an older version logged it."""
    with store() as (_, experiment_id):
        run_id = client.create_run(experiment_id, run_name="old").info.run_id
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, 1, 0) for name, value in (metrics or {}).items()],
        params=[Param(name, value) for name, value in (params or {}).items()],
        tags=[RunTag(name, value) for name, value in (OLD | tags).items()],
    )
    return run_id


def update(client: MlflowClient) -> None:
    with store() as (_, experiment_id):
        bring_up_to_date(client, experiment_id)


def test_old_metrics_are_there_in_todays_units_too_and_tags_are_hidden(client):
    metrics = {"accuracy": 0.9, "flops_mean": 6e6, "full_flops": 1e7}
    run_id = old_run(client, metrics=metrics, **{"blockdrop.role": "parent"})
    update(client)
    run = client.get_run(run_id)
    assert run.data.metrics == metrics | {"mflops_mean": 6.0, "full_mflops": 10.0, "flops_share": 0.6}
    assert run.data.tags.items() >= {f"mlflow.{tag}": text for tag, text in OLD.items()}.items()
    assert not OLD.keys() & run.data.tags.keys()
    assert run.data.tags["blockdrop.role"] == "parent"
    update(client)  # once
    assert client.get_run(run_id).to_dictionary() == run.to_dictionary()
    assert len(client.get_metric_history(run_id, "mflops_mean")) == 1


def test_stage_finds_the_parent_that_an_older_version_made(client, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "old")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")
    params = {"gamma": 2.0, "test": "found"}
    key = experiment_key("old", "abc", as_texts(params))
    run_id = old_run(client, **{"blockdrop.key": key, "blockdrop.role": "parent"})
    with stage_run("pretrain", params) as run:
        pass
    assert run.parent_id == run_id


def test_experiment_of_an_older_version_is_completed_once(client, tmp_path):
    files = dvc_results.work_tree(str(experiment_files.write(tmp_path, model=False)))
    record = dvc_results.read(files, name="old", baseline="abc", revision="r1")
    run_id = experiment_runs.complete(record, finish=True)
    tags = client.get_run(run_id).data.tags
    for tag in [tag for tag in tags if tag.startswith("mlflow.blockdrop.")]:
        client.set_tag(run_id, tag.removeprefix("mlflow."), tags[tag])
        client.delete_tag(run_id, tag)
    update(client)
    assert client.get_run(run_id).data.tags == tags
    assert experiment_runs.complete(record, finish=True) == run_id


def test_view_is_made_with_the_experiment_and_kept(client):
    name, content = view.tag()
    with store() as (_, experiment_id):
        assert client.get_experiment(experiment_id).tags[name] == content
        client.set_experiment_tag(experiment_id, name, "of another version")
        keep_view(client, experiment_id)
        assert client.get_experiment(experiment_id).tags[name] == content
    assert f"viewStateShareKey={name.rpartition('.')[2]}" in overview.links("1", [], "")["all runs"]
