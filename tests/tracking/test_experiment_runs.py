"""The parent run of an experiment holds all of it, once, however often it is completed."""

import shlex
from pathlib import Path

import experiment_files
import mlflow
import numpy as np
import pytest
from builders import enter_project
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.infra.safe_io import printable
from pipeline.report import html
from pipeline.tracking import dvc_results, experiment_runs, overview, registry, units
from pipeline.tracking.runs import stage_run
from pipeline.tracking.store import store
from research import screenshots
from tools import front, promote, sync


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    enter_project(home, monkeypatch)


@pytest.fixture
def client(home) -> MlflowClient:
    with store() as (client, _):
        return client


def record_of(folder, name, *, revision="r1", baseline="abc", **changes):
    experiment_files.write(folder, **changes)
    files = dvc_results.work_tree(str(folder))
    return dvc_results.read(files, name=name, baseline=baseline, revision=revision)


def completed(record: dvc_results.Record) -> str:
    return experiment_runs.complete(record, finish=True)


def all_runs(client) -> list[Run]:
    with store() as (_, experiment_id):
        return client.search_runs([experiment_id])


def runs_named(client, name: str) -> list[Run]:
    return [run for run in all_runs(client) if run.info.run_name == name]


def test_parent_carries_everything_once(client, tmp_path, monkeypatch):
    record = record_of(tmp_path, "all")
    run = client.get_run(completed(record))
    run_id, tags = run.info.run_id, run.data.tags
    assert completed(record) == run_id  # which adds nothing
    assert client.get_run(run_id).to_dictionary() == run.to_dictionary()
    assert (run.info.run_name, run.info.status) == ("all", "FINISHED")
    assert run.data.params == record.params
    assert run.data.metrics.items() >= units.readable(record.metrics).items()
    assert tags["dvc.revision"] == "r1"
    assert tags["dvc.md5.models/finetune"] == record.outs["models/finetune"]
    assert "| **BlockDrop** | 90.00 % | 1.50 | 6 |" in tags["mlflow.note.content"]
    assert "| ResNet-20 | 92.00 % |  | 5 |" in tags["mlflow.note.content"]
    curve = client.get_metric_history(run_id, "finetune/validation_accuracy")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.75)]
    assert len(client.get_metric_history(run_id, "accuracy")) == 1
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("digits", "aa" * 16)
    picture = client.download_artifacts(run_id, "report/policy.png", str(tmp_path))
    assert Path(picture).read_bytes() == experiment_files.PNG
    (output,) = run.outputs.model_outputs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert len(model.predict(np.zeros((3, 8, 8, 3), np.uint8))) == 3


def test_people_see_the_headline_and_no_tag_of_the_code(client, tmp_path):
    run = client.get_run(completed(record_of(tmp_path, "shown", model=False)))
    shown = {tag for tag in run.data.tags if not tag.startswith("mlflow.")}  # as MLflow's pages do
    assert shown == {
        "blockdrop.role", "dvc.baseline", "dvc.experiment", "dvc.md5.models/finetune", "git.commit",
    }  # fmt: skip
    headline = {"mflops_mean": 6.0, "flops_share": 0.6, "full_mflops": 10.0, "sole.20.mflops": 5.0}
    assert run.data.metrics.items() >= headline.items()
    assert not {"flops_mean", "full_flops", "sole.20.flops"} & run.data.metrics.keys()


def test_the_front_is_drawn_of_what_mlflow_has(client, tmp_path):
    """MLflow has millions of FLOPs, and files of metrics have FLOPs."""
    record = record_of(tmp_path, "drawn", model=False)
    run_id = completed(record)
    (experiment,) = (found for found in overview.experiments()[1] if found.run_id == run_id)
    row = front.row_of(experiment)
    assert row["flops"] == pytest.approx(record.metrics["flops_mean"])
    full, sole = front.baselines_of(experiment)
    assert full["flops"] == pytest.approx(record.metrics["full_flops"])
    assert sole["flops"] == pytest.approx(record.metrics["sole.20.flops"])


def test_interrupted_completion_is_completed(client, tmp_path, monkeypatch):
    record = record_of(tmp_path, "interrupted")

    def fail(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", fail)
        with pytest.raises(OSError, match="disk full"):
            completed(record)
    run = client.get_run(completed(record))
    assert [item.path for item in client.list_artifacts(run.info.run_id, "report")] != []
    assert len(runs_named(client, "interrupted")) == 1


def test_data_set_that_another_clone_adds_at_the_same_moment_is_linked(client, tmp_path, monkeypatch):
    """A database refuses the second of two equal rows, seen with PostgreSQL and four clones."""
    log_inputs, refused = MlflowClient.log_inputs, []

    def refuse_once(*arguments, **options):
        if not refused:
            refused.append(True)
            raise MlflowException("duplicate key value violates unique constraint")
        return log_inputs(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_inputs", refuse_once)
    run = client.get_run(completed(record_of(tmp_path, "together", model=False)))
    assert refused
    assert len(run.inputs.dataset_inputs) == 1
    assert run.info.status == "FINISHED"


def test_result_whose_experiment_failed_half_way_gets_no_second_run(client, tmp_path, monkeypatch):
    """After `dvc exp run` the work tree has the experiment's result, and is logged after it."""
    baseline = str(tmp_path)
    record = record_of(tmp_path, "half", baseline=baseline, model=False)
    applied = record_of(tmp_path, "", revision="", baseline=baseline, model=False)

    def fail(*arguments, **options):
        raise MlflowException("away")

    with monkeypatch.context() as patch:
        patch.setattr(experiment_runs, "_log_metrics", fail)
        with pytest.raises(MlflowException, match="away"):
            completed(record)
    with store() as (_, experiment_id):
        found = experiment_runs.find(client, experiment_id, applied)
    assert found is not None
    assert found.info.run_name == "half"


def test_stages_that_ran_stand_under_the_completed_parent(client, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "ran-here")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")
    record = record_of(tmp_path, "ran-here")
    params = {"gamma": 2.0, "seed": 0, "data.source": "digits", "resnet.depth": 8,
              "resnet.std": (1.0, 2.5)}  # fmt: skip
    with stage_run("finetune", params) as run:
        pass
    assert completed(record) == run.parent_id


def test_completion_from_inside_a_stage_leaves_the_status_to_it(client, tmp_path):
    run = client.get_run(experiment_runs.complete(record_of(tmp_path, "inside"), finish=False))
    assert run.info.status == "RUNNING"
    client.set_terminated(run.info.run_id, "KILLED")


def test_experiment_in_the_place_of_another_retires_it(client, tmp_path):
    old = completed(record_of(tmp_path, "same", gamma=2))
    new = completed(record_of(tmp_path, "same", gamma=5, revision="r2"))
    assert new != old
    assert client.get_run(old).info.run_name == "same (superseded)"
    assert client.get_run(new).info.run_name == "same"
    shown = {experiment.run_id for experiment in overview.experiments()[1]}
    assert new in shown
    assert old not in shown


def test_equal_results_are_found_under_any_name(client, tmp_path):
    applied = record_of(tmp_path, "applied", accuracy=0.123)
    run_id = completed(applied)
    elsewhere = record_of(tmp_path, "main-1234567", baseline="def", revision="", accuracy=0.123)
    with store() as (_, experiment_id):
        assert experiment_runs.find(client, experiment_id, elsewhere).info.run_id == run_id
        other = record_of(tmp_path, "main-1234567", baseline="def", revision="", accuracy=0.125)
        assert experiment_runs.find(client, experiment_id, other) is None


def test_experiment_is_completed_when_its_files_come(client, tmp_path):
    record = record_of(tmp_path, "pulled", model=False)
    run_id = completed(record)
    assert "dvc.revision" not in client.get_run(run_id).data.tags  # so the next sync looks again
    experiment_files.write_model(tmp_path / "models/finetune")
    assert completed(record) == run_id
    run = client.get_run(run_id)
    assert run.data.tags["dvc.revision"] == "r1"
    assert len(run.outputs.model_outputs) == 1


def test_table_and_links_show_siblings(client, tmp_path):
    records = (
        record_of(tmp_path, f"sweep-{gamma}", baseline="sweep", gamma=gamma, revision=f"s{gamma}")
        for gamma in (1, 5, 10)
    )
    ids = [completed(record) for record in records]
    experiment_id, finished = overview.experiments()
    rows = overview.table(finished, marked=ids[0])
    assert rows[0][:3] == ["experiment", "gamma", "accuracy"]
    assert ["sweep-1 *", "1", "90.00 %", "95.00 %", "1.50", "40.00 %", "4"] in rows
    links = overview.links(experiment_id, finished, ids[0], address="http://here:1")
    assert links["all runs"].startswith("http://here:1/#/experiments/")
    assert ids[0] in links["this experiment"]
    assert all(run_id in links["its gammas compared"] for run_id in ids)
    assert list(overview.links("1", [], "nothing", address="http://here:1")) == ["all runs"]


def test_table_folds_a_long_name_and_cuts_no_number(client, tmp_path, capsys):
    name = "main-1234567 " + " ".join(f"data.key{number}={number}" for number in range(18))
    overview.say(completed(record_of(tmp_path, name, baseline="long")))
    lines = capsys.readouterr().out.splitlines()
    titles = next(line for line in lines if "experiment" in line)
    assert all(title in titles for title in ("gamma", "accuracy", "every block", "policies"))
    begin = next(number for number, line in enumerate(lines) if "main-1234567" in line)
    assert all(cell in lines[begin] for cell in ("90.00 %", "95.00 %", "1.50", "40.00 %"))
    assert name.split()[-1] + " *" in "".join(lines[begin : begin + 20])
    assert max(map(len, lines[:begin])) <= 120


@pytest.mark.slow
def test_server_gets_all_of_it_through_its_own_artifact_store(client, tmp_path, monkeypatch):
    record = record_of(tmp_path, "served")
    with screenshots.server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "on-a-server")
        with stage_run("finetune", {"gamma": 7}) as run:
            run.log_metrics({"loss": 0.5})
        remote = MlflowClient(tracking_uri=address)
        assert remote.get_run(run.run_id).data.metrics == {"loss": 0.5}
        parent = remote.get_run(completed(record))
        assert parent.info.artifact_uri.startswith("mlflow-artifacts:")
        assert parent.data.metrics.items() >= units.readable(record.metrics).items()
        assert len(parent.outputs.model_outputs) == 1
        local = remote.download_artifacts(parent.info.run_id, "report/policy.png", str(tmp_path))
        assert Path(local).read_bytes() == experiment_files.PNG


def test_one_experiment_of_each_setting_is_compared():
    def experiment(run_id, gamma, depth="32", seed="0"):
        params = {"gamma": gamma, "seed": seed, "resnet.depth": depth}
        return overview.Experiment(run_id=run_id, name=run_id, params=params, metrics={})

    chosen = experiment("chosen", "2")
    others = [experiment("newer", "2"), chosen, experiment("five", "5"), experiment("older five", "5")]
    others += [experiment("deep", "5", "110"), experiment("seed", "5", seed="1")]
    assert [e.run_id for e in overview.siblings(chosen, others)] == ["chosen", "five", "seed"]


# names that are anything

NAMES = [
    "it's $(id)", "a'b\"c\\ a`b", "[/v2] a|b 100%", "<b>", "\x1b[31mred", "a\nerror: forged"
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_experiment_of_any_name_is_logged_shown_and_followed(client, tmp_path, capsys, name):
    baseline = f"{NAMES.index(name)}"
    old = completed(record_of(tmp_path, name, baseline=baseline))
    new = completed(record_of(tmp_path, name, baseline=baseline, gamma=5, revision="r2"))
    assert client.get_run(old).data.tags["blockdrop.superseded"]
    run = client.get_run(new)
    assert run.info.run_name == name
    command = f"dvc exp apply {shlex.quote(name)}"
    assert html.as_code(command) in run.data.tags["mlflow.note.content"]
    overview.say(new)
    output = capsys.readouterr().out
    assert printable(name) in output
    assert all(line.isprintable() for line in output.splitlines())


def references_of(tmp_path, monkeypatch, names: dict[str, str]) -> None:
    """Let DVC know experiments of these names, and of these commits."""

    def read(reference, root):
        if reference.revision == "broken":
            raise KeyError("md5")
        return record_of(tmp_path, reference.name, revision=reference.revision, baseline=str(tmp_path))

    listed = [sync.Reference(name=n, baseline=str(tmp_path), revision=r) for n, r in names.items()]
    monkeypatch.setattr(sync, "references", lambda root: listed)
    monkeypatch.setattr(sync, "read", read)


def test_bad_experiment_stops_no_other_and_is_named(client, tmp_path, monkeypatch, capsys):
    first, last = f"{tmp_path.name}'1", f"{tmp_path.name}'2"
    references_of(tmp_path, monkeypatch, {first: "1", "bad\x1b": "broken", last: "2"})
    monkeypatch.setattr("sys.argv", ["sync"])
    with pytest.raises(SystemExit, match=r"^error: bad\\x1b: not logged, for the reasons above"):
        sync.main()
    assert "bad\\x1b: not logged, 'md5'" in capsys.readouterr().err
    for name in (first, last):
        (run,) = runs_named(client, name)
        assert run.info.status == "FINISHED"


def test_store_that_goes_away_stops_the_sync(tmp_path, monkeypatch):
    references_of(tmp_path, monkeypatch, {"a": "broken", "b": "broken"})
    calls = []

    def away():
        calls.append(1)
        raise OSError("away")

    def lose(*_):
        monkeypatch.setattr(sync, "store", away)
        raise OSError("away")

    monkeypatch.setattr(sync, "read", lose)
    with pytest.raises(OSError, match="away"):
        sync.sync(tmp_path)
    assert calls == [1]


def test_renamed_experiment_is_followed(client, tmp_path, monkeypatch, capsys):
    before, after = f"{tmp_path.name}-old", f"{tmp_path.name}-new'"
    references_of(tmp_path, monkeypatch, {before: f"{tmp_path}"})
    sync.sync(tmp_path)
    count = len(all_runs(client))
    references_of(tmp_path, monkeypatch, {after: f"{tmp_path}"})
    for _ in range(2):
        sync.sync(tmp_path)
    assert capsys.readouterr().out.count(f"{after}: renamed, it was {before}") == 1
    assert len(all_runs(client)) == count
    (run,) = runs_named(client, after)
    assert run.data.tags["dvc.experiment"] == after
    assert f"{tmp_path.name}-new" in run.data.tags["mlflow.note.content"]
    references_of(tmp_path, monkeypatch, {after: f"{tmp_path}", "twin": f"{tmp_path}"})
    sync.sync(tmp_path)
    assert runs_named(client, "twin") == []


def test_promote_follows_a_new_name(tmp_path, monkeypatch):
    references_of(tmp_path, monkeypatch, {f"{tmp_path.name}-a": f"{tmp_path}"})
    sync.sync(tmp_path)
    references_of(tmp_path, monkeypatch, {f"{tmp_path.name}-b": f"{tmp_path}"})
    first = promote.promote_newest(f"{tmp_path.name}-b", registered_name="it's mine")
    assert (first.run_name, first.version) == (f"{tmp_path.name}-b", 1)
    assert promote.promote_newest(first.run_id, registered_name="it's mine").version == 1
    with pytest.raises(registry.ModelError, match="no experiment the name 'c'"):
        promote.promote_newest("c")
    with pytest.raises(registry.ModelError, match="both kinds of quotes"):
        promote.promote_newest(first.run_id, registered_name='it\'s "mine"')


def test_project_without_git_says_so(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    message = r"^error: DVC can't list .*not a git repository.*`git init` makes one"
    with pytest.raises(SystemExit, match=message), sync.usable_store():
        sync.sync(tmp_path)
