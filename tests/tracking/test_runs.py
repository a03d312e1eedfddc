"""Runs in MLflow: how they begin and end, which store they are in, and that no stage needs them."""

import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from builders import TRACKING_VARIABLES, enter_project, small_pair
from filelock import FileLock
from mlflow import MlflowClient

from pipeline.models import checkpoint
from pipeline.tracking import processes, registry, store
from pipeline.tracking.identity import as_texts, experiment_name, origin_tags
from pipeline.tracking.processes import Driver, this_process
from pipeline.tracking.runs import TAG_PROCESS, end_orphans, stage_run
from pipeline.tracking.store import store_uri

ROOT = Path(__file__).parents[2]
TOGETHER = {"seed": 0, "resnet.mean": (0.5, 0.5, 0.5)}
PROCESS = """
import sys
sys.modules["torch"] = type(sys)("torch")  # slow to import, and not needed here
from pipeline.tracking import runs, store
runs.TIMEOUT, store.LOCK_TIMEOUT = 100.0, 600.0  # not tested here, and the machine may be busy
from pipeline.tracking.runs import stage_run
with stage_run(sys.argv[1], {"seed": 0, "resnet.mean": (0.5, 0.5, 0.5)}) as run:
    print(run.run_id, run.parent_id)
"""


@pytest.fixture(scope="module")
def started_together(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A store that four processes set up at once, and the run and parent of each."""
    root = tmp_path_factory.mktemp("store")
    environment = {name: value for name, value in os.environ.items() if name not in TRACKING_VARIABLES}
    environment |= {"DVC_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, stage],
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for stage in ("pretrain", "curriculum", "finetune", "sole-20")
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], outputs
    assert not any("can't be reached" in err for _, err in outputs), outputs
    return root, [out.split() for out, _ in outputs]


@pytest.fixture
def root(started_together, monkeypatch) -> Path:
    folder = started_together[0]
    enter_project(folder, monkeypatch)
    return folder


@pytest.fixture
def client(root) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture
def params(request) -> dict[str, object]:
    """Other parameters for every test, so another parent."""
    return {"test": request.node.name}


def complaints(capsys) -> int:
    return capsys.readouterr().err.count("MLflow can't be reached")


def lifecycles(client, *runs) -> list[str]:
    return [client.get_run(run.run_id).info.lifecycle_stage for run in runs]


def statuses(client, *run_ids: str) -> list[str]:
    return [client.get_run(run_id).info.status for run_id in run_ids]


def points(client, run_id: str, name: str = "loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_four_processes_on_a_fresh_store_find_one_parent(started_together, client):
    root, runs = started_together
    assert (root / ".dvc" / "tmp").is_dir()  # for the lock
    assert len({run for run, _ in runs}) == 4
    assert len({parent for _, parent in runs}) == 1
    experiment = client.get_experiment_by_name("blockdrop")
    same = "tags.`blockdrop.role` = 'parent' and params.seed = '0'"
    assert len(client.search_runs([experiment.experiment_id], filter_string=same)) == 1


def test_experiment_that_another_machine_creates_meanwhile_is_taken(client, params, monkeypatch, capsys):
    """The lock is this project's alone: someone else's clone may create it between look and creation."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "created twice")
    find, created = MlflowClient.get_experiment_by_name, []

    def look(self, name):
        if created:
            return find(self, name)
        created.append(client.create_experiment(name))
        return None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look)
    with stage_run("pretrain", params) as run:
        pass
    assert complaints(capsys) == 0
    assert client.get_run(run.run_id).info.experiment_id == created[0]


def test_stage_and_its_parent_begin_and_finish_together(client, params):
    params |= {"gamma": 2.0, "policy_net.input_size": None, "resnet.mean": (0.1, 0.2, 0.3)}
    with stage_run("pretrain", params) as run:
        assert statuses(client, run.run_id, run.parent_id) == ["RUNNING"] * 2
    assert statuses(client, run.run_id, run.parent_id) == ["FINISHED"] * 2
    child, parent = client.get_run(run.run_id), client.get_run(run.parent_id)
    assert child.info.run_name == child.data.tags["blockdrop.stage"] == "pretrain"
    assert child.data.tags["mlflow.parentRunId"] == run.parent_id
    assert parent.data.tags["blockdrop.role"] == "parent"
    texts = {"gamma": "2", "policy_net.input_size": "null", "resnet.mean": "[0.1, 0.2, 0.3]"}
    assert child.data.params == parent.data.params == texts | {"test": params["test"]}


def test_equal_parameters_are_equal_texts_whoever_read_them():
    assert as_texts({"a": 2, "b": [1, 0.5]}) == as_texts({"a": 2.0, "b": (1.0, 0.5)})
    assert as_texts({"a": 1}) != as_texts({"a": True})
    assert as_texts({"a": 1e-05}) == {"a": "1e-05"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ValueError, "FAILED")],
)
def test_exception_goes_on_and_leaves_its_status(client, params, error, status):
    with pytest.raises(error), stage_run("pretrain", params) as run:
        raise error
    assert statuses(client, run.run_id, run.parent_id) == [status] * 2


def test_next_stage_of_the_same_parameters_wakes_the_parent(client, params):
    with stage_run("pretrain", params) as first:
        pass
    with stage_run("curriculum", dict(reversed(params.items()))) as second:
        assert client.get_run(second.parent_id).info.status == "RUNNING"
    assert second.parent_id == first.parent_id
    assert second.run_id != first.run_id


@pytest.fixture
def driven(monkeypatch):
    """Let stages be started by a DVC of this description, with these words on its command line."""

    def start(*targets: str, process: str = "") -> None:
        driver = Driver(process=process or this_process(), targets=frozenset(targets))
        monkeypatch.setattr(processes, "driver", lambda: driver)

    return start


def gone_process() -> str:
    """The description of a process of this machine that has ended."""
    return f"{platform.node()} {os.getpid()} 1.0"


def test_parent_runs_from_dvcs_first_stage_to_the_report(client, params, driven):
    driven("dvc", "repro")
    for stage in ("pretrain", "sole-20", "finetune"):
        with stage_run(stage, params) as run:
            pass
        assert statuses(client, run.run_id, run.parent_id) == ["FINISHED", "RUNNING"]
    with stage_run("report", params) as run:
        pass
    assert statuses(client, run.parent_id) == ["FINISHED"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_stage_that_fails_under_dvc_ends_the_parent_until_it_is_resumed(
    client, params, driven, error, status
):
    driven("dvc", "repro")
    with stage_run("pretrain", params):
        pass
    with pytest.raises(error), stage_run("finetune", params) as failed:
        raise error
    assert statuses(client, failed.run_id, failed.parent_id) == [status] * 2
    with stage_run("finetune", params, resumed=failed.run_id) as run:
        assert statuses(client, run.run_id, run.parent_id) == ["RUNNING"] * 2
    assert (run.run_id, run.parent_id) == (failed.run_id, failed.parent_id)
    assert statuses(client, run.run_id, run.parent_id) == ["FINISHED", "RUNNING"]
    with stage_run("report", params):
        pass
    assert statuses(client, run.parent_id) == ["FINISHED"]


@pytest.mark.parametrize(("stage", "target"), [("finetune", "finetune"), ("sole-20", "sole")])
def test_parent_ends_with_the_stage_that_dvc_was_to_stop_at(client, params, driven, stage, target):
    driven("dvc", "repro", target)
    with stage_run(stage, params) as run:
        pass
    assert statuses(client, run.parent_id) == ["FINISHED"]


def test_parent_whose_dvc_was_killed_is_ended_but_not_under_a_stage_that_lives(client, params, driven):
    driven("dvc", "repro")
    with stage_run("pretrain", params) as run:
        experiment_id = client.get_run(run.run_id).info.experiment_id
        client.set_tag(run.parent_id, TAG_PROCESS, gone_process())
        assert end_orphans(client, experiment_id) == []
    assert statuses(client, run.parent_id) == ["RUNNING"]
    assert end_orphans(client, experiment_id) == [run.parent_id]
    assert statuses(client, run.parent_id) == ["KILLED"]


def test_stage_that_outlives_dvc_ends_the_parent_itself(client, params, driven):
    driven("dvc", "repro", process=gone_process())
    with stage_run("pretrain", params) as run:
        pass
    assert statuses(client, run.parent_id) == ["FINISHED"]


@pytest.mark.parametrize(("name", "found"), [("dvc", True), ("other", False)])
def test_dvc_is_known_by_its_command_line(tmp_path, name, found):
    ask = "from pipeline.tracking.processes import driver; print(driver())"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    (tmp_path / name).write_text(program)
    answer = subprocess.run(
        [sys.executable, tmp_path / name, "repro", "sole@20"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert ("Driver(" in answer) == ("'sole'" in answer) == found


def test_other_parameters_or_experiments_have_another_parent(client, params, monkeypatch):
    parents = []

    def start(**changes: object) -> None:
        with stage_run("pretrain", params | changes) as run:
            parents.append(run.parent_id)

    start()
    start(gamma=5)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")
    start()
    monkeypatch.setenv("DVC_EXP_NAME", "tawny-quop")
    start()
    assert len(set(parents)) == 4
    assert client.get_run(parents[-1]).info.run_name == "tawny-quop"


def test_resumed_run_goes_on_under_the_experiment_that_resumed_it(client, params, monkeypatch):
    with stage_run("pretrain", params) as first:
        first.log_metrics({"loss": 2.0}, step=0)
    client.set_terminated(first.run_id, "KILLED")
    with stage_run("pretrain", params, resumed=first.run_id) as second:
        assert statuses(client, second.run_id) == ["RUNNING"]
        second.log_metrics({"loss": 1.0}, step=1)
    assert (second.run_id, second.parent_id) == (first.run_id, first.parent_id)
    assert statuses(client, first.run_id) == ["FINISHED"]
    assert points(client, first.run_id) == [(0, 2.0), (1, 1.0)]
    monkeypatch.setenv("DVC_EXP_NAME", "second-try")
    with stage_run("pretrain", params, resumed=first.run_id) as third:
        pass
    assert third.run_id == first.run_id
    assert third.parent_id != first.parent_id
    assert client.get_run(first.run_id).data.tags["mlflow.parentRunId"] == third.parent_id


@pytest.mark.parametrize("deleted", [False, True])
def test_resumed_run_that_is_gone_gives_way_to_a_new_one(client, params, capsys, deleted):
    gone = 32 * "0"
    if deleted:
        with stage_run("pretrain", params) as first:
            gone = first.run_id
        client.delete_run(gone)
    with stage_run("pretrain", params, resumed=gone) as run:
        run.log_metrics({"loss": 1.0})
    assert complaints(capsys) == 0
    assert client.get_run(run.run_id).data.metrics == {"loss": 1.0}


def test_run_that_a_killed_process_left_running_is_ended(client, params):
    script = PROCESS + "    import os; os.kill(os.getpid(), 9)\n"
    killed = subprocess.run(
        [sys.executable, "-uc", script, "pretrain"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    run_id, parent_id = killed.stdout.split()
    assert statuses(client, run_id, parent_id) == ["RUNNING"] * 2
    with stage_run("pretrain", params) as alive:
        assert statuses(client, run_id, parent_id) == ["KILLED"] * 2
        assert end_orphans(client, client.get_run(alive.run_id).info.experiment_id) == []
        assert statuses(client, alive.run_id) == ["RUNNING"]


def test_stage_that_finished_takes_the_place_of_its_earlier_runs(client, params):
    with stage_run("evaluate", params) as first, stage_run("pretrain", params) as other:
        pass
    with pytest.raises(ValueError), stage_run("evaluate", params) as failed:  # noqa: PT011
        raise ValueError
    assert lifecycles(client, first, failed, other) == ["active"] * 3
    with stage_run("evaluate", params) as last:
        pass
    assert lifecycles(client, first, failed, other, last) == ["deleted", "deleted", "active", "active"]


def test_stage_that_finishes_late_leaves_a_later_run(client, params):
    with stage_run("evaluate", params) as early:
        time.sleep(0.01)  # runs begin at milliseconds
        with stage_run("evaluate", params) as late:
            pass
    assert lifecycles(client, early, late) == ["active", "active"]


def test_metrics_of_short_epochs_are_written_together(client, params, monkeypatch):
    calls = []
    real = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    with stage_run("pretrain", params) as run:
        before = len(calls)
        for step in range(100):
            run.log_metrics({"loss": float(step)}, step=step)
        assert len(calls) == before
        monkeypatch.setattr(run, "_next_flush", 0.0)
        run.log_metrics({"loss": 100.0}, step=100)
        assert len(calls) == before + 1
    assert points(client, run.run_id) == [(i, float(i)) for i in range(101)]


def test_undefined_metrics_are_left_out(client, params, capsys):
    with stage_run("evaluate", params) as run:
        run.log_metrics({"spearman": None})
        run.log_metrics({"accuracy": 0.5, "spearman": None})
    assert complaints(capsys) == 0
    assert client.get_run(run.run_id).data.metrics == {"accuracy": 0.5}


def test_more_metrics_than_mlflow_takes_at_once_all_arrive(client, params, capsys):
    many = {f"p{index}": index for index in range(130)} | params
    with stage_run("pretrain", many) as run:
        for step in range(120):  # of a fast training, all within `FLUSH_SECONDS`
            run.log_metrics({f"m{index}": float(step) for index in range(20)}, step=step)
    assert complaints(capsys) == 0
    data = client.get_run(run.run_id).data
    assert len(data.params) == len(many)
    assert len(data.metrics) == 20
    assert len(points(client, run.run_id, "m19")) == 120


def test_files_go_to_the_main_checkout(client, params, root, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("own")
    with stage_run("report", params) as run:
        run.log_artifact(tmp_path / "missing")
        run.log_artifact(tmp_path / "own.txt")
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["own.txt"]
    assert "own.txt" in {path.name for path in (root / "mlartifacts").rglob("*.txt")}
    assert capsys.readouterr().err == f"{tmp_path / 'missing'} is not there, so it is not logged\n"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("call", ["log_batch", "set_tag", "log_artifact", "set_terminated"])
def test_call_that_fails_is_said_once_and_stops_nothing(params, tmp_path, monkeypatch, capsys, call):
    def fail(*arguments, **options):
        raise OSError("disk full")

    (tmp_path / "a.txt").write_text("a")
    with stage_run("pretrain", params) as run:
        monkeypatch.setattr(MlflowClient, call, fail)
        run.log_metrics({"loss": 1.0})
        run.set_tag("warning", "one policy")
        run.log_artifact(tmp_path / "a.txt")
    message = capsys.readouterr().err
    assert message.count("\n") == message.count("MLflow can't be reached (disk full)") == 1
    assert "metrics/ and plots/; `make sync` logs later what it misses" in message


@pytest.mark.usefixtures("root")
def test_server_out_of_reach_hides_no_exception_of_the_body(params, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(KeyboardInterrupt), stage_run("pretrain", params, resumed="abc"):
        raise KeyboardInterrupt
    assert complaints(capsys) == 1


@pytest.mark.usefixtures("root")
def test_lock_that_nobody_gives_back_is_said_and_stops_nothing(root, params, monkeypatch, capsys):
    monkeypatch.setattr(store, "LOCK_TIMEOUT", 0.05)
    with FileLock(root / ".dvc" / "tmp" / "mlflow.lock"), stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0})
    assert complaints(capsys) == 1


def test_tracking_that_is_off_writes_says_and_hides_nothing(tmp_path, params, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def fail() -> None:
        with stage_run("pretrain", params) as run:
            run.log_metrics({"loss": 1.0})
            run.log_artifact(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("", "sqlite:///{root}/mlflow.db"),
        ("sqlite:///sub/x.db", "sqlite:///{root}/sub/x.db"),
        ("sqlite+pysqlite:///x.db?timeout=5", "sqlite+pysqlite:///{root}/x.db?timeout=5"),
        ("sqlite:////elsewhere/x.db", "sqlite:////elsewhere/x.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("sqlite:x.db", "sqlite:x.db"),
        ("./mlruns", "./mlruns"),
        ("postgresql://u:p@h/x", "postgresql://u:p@h/x"),
        (" HTTP://Host:5000 ", "http://Host:5000"),
    ],
)
def test_relative_store_is_in_the_main_checkout(root, tmp_path, monkeypatch, given, used):
    """A temporary checkout (`dvc exp run --temp`, `--queue`) is deleted, and the file with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert store_uri() == used.format(root=root)


def test_run_in_a_temporary_checkout_is_in_the_main_store(root, params, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.chdir(tmp_path)
    with stage_run("pretrain", params) as run:
        pass
    assert list(tmp_path.iterdir()) == []
    assert MlflowClient(f"sqlite:///{root}/mlflow.db").get_run(run.run_id).info.status == "FINISHED"


def test_mlflow_under_a_percent_sign_says_what_helps(root, params, monkeypatch, capsys):
    """With a project its .venv may lie in such a folder, and Alembic's settings take no % in a path."""
    monkeypatch.setattr("mlflow.__file__", "/srv/50%/.venv/mlflow/__init__.py")
    with stage_run("pretrain", params):
        ran = True
    assert ran
    message = capsys.readouterr().err
    assert "MLflow opens no database from /srv/50%/.venv/mlflow, as there is a % in it" in message
    assert "give the folder another name" in message


def brought_to(folder: Path, root: Path, monkeypatch) -> Path:
    """Copy a project, and be in the copy."""
    shutil.copytree(root, folder)
    enter_project(folder, monkeypatch)
    return folder


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def paths_in(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as opened:
        return {
            text
            for table, column in store.PATH_COLUMNS
            for (text,) in opened.execute(f"SELECT {column} FROM {table}")
            if text
        }


@pytest.fixture
def logged(root, params, tmp_path) -> str:
    """A run with a file and a registered model, in the project to be copied."""
    (tmp_path / "own.txt").write_text("own")
    checkpoint.save(small_pair(classes=("a", "b"), image_size=8), tmp_path / "model")
    with stage_run("report", params) as run:
        run.log_artifact(tmp_path / "own.txt")
    registry.log_model(run.parent_id, tmp_path / "model")
    registry.promote(run.parent_id)
    return run.run_id


@pytest.mark.parametrize(
    ("fate", "name"),
    [
        ("moved", "new"),
        ("another user's", "new"),
        ("copied", "50% a?b=c#d"),
        ("copied", "%20 it's; `x` $3 @:&"),
    ],
)
def test_project_that_was_brought_elsewhere_has_its_files_there(
    root, logged, params, tmp_path, monkeypatch, capsys, fate, name
):
    home = root
    if fate == "moved":  # the other tests need the first one
        home = brought_to(tmp_path / "first", root, monkeypatch)
        store.experiment_id()
    folder = brought_to(tmp_path / name, home, monkeypatch)
    if fate == "moved":
        shutil.rmtree(home)
    if fate == "another user's":
        monkeypatch.setattr(Path, "samefile", lambda *paths: (_ for _ in ()).throw(PermissionError()))
    before = files_in(home)
    contents = {path: path.read_bytes() for path in before}
    capsys.readouterr()

    (tmp_path / "new.txt").write_text("new")
    with stage_run("report", params | {"new": 1}) as run:
        run.log_artifact(tmp_path / "new.txt")
    message = capsys.readouterr().err
    assert message.startswith(f"mlflow.db comes from {home}; ")
    assert "can't be reached" not in message
    assert {path: path.read_bytes() for path in files_in(home)} == contents
    assert [path.name for path in folder.rglob("new.txt")] == ["new.txt"]
    opened = MlflowClient(store_uri())
    assert Path(opened.download_artifacts(logged, "own.txt")).read_text() == "own"
    with registry.fetched("models:/blockdrop@champion") as model:
        assert checkpoint.load(model).classes == ("a", "b")
    prefixes = (f"{folder.as_uri()}/", f"{folder}/")
    assert all(path.startswith(prefixes) for path in paths_in(folder / "mlflow.db"))
    capsys.readouterr()
    store.experiment_id()
    assert capsys.readouterr().err == ""  # said once


def test_files_that_are_wanted_elsewhere_stay_there(root, tmp_path, monkeypatch):
    """An experiment made by hand, with a place on another disk."""
    disk = tmp_path / "disk" / "mlartifacts"
    disk.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    client.create_experiment("elsewhere", artifact_location=disk.as_uri())
    store.experiment_id()
    assert client.get_experiment_by_name("elsewhere").artifact_location == disk.as_uri()


@pytest.mark.parametrize("whose", ["named", "linked"])
def test_database_of_another_project_is_not_touched(root, tmp_path, monkeypatch, whose):
    folder = brought_to(tmp_path / "copy", root, monkeypatch)
    database = (folder / "mlflow.db").rename(tmp_path / "shared.db")
    if whose == "named":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    else:
        (folder / "mlflow.db").symlink_to(database)
    before = paths_in(database)
    store.experiment_id()
    assert paths_in(database) == before


def commit_here(*files: str) -> None:
    """Make this folder a repository with a commit of the files on the branch `trunk`."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
    subprocess.run([*git, "add", *files], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)


def test_name_without_dvc_is_branch_commit_and_what_differs(root, tmp_path, monkeypatch):
    assert experiment_name({"gamma": "2"}) == "no-git-no-commit"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("gamma: 2\na: {b: 1, c: 2, d: 3}\n")
    commit_here("params.yaml")
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    same = {"gamma": "2", "a.b": "1", "a.c": "2", "a.d": "3"}
    assert experiment_name(same) == f"trunk-{head}"
    assert experiment_name(same | {"gamma": "5"}) == f"trunk-{head} gamma=5"
    changed = experiment_name({"gamma": "5", "a.b": "0", "a.c": "0", "a.d": "0"})
    assert changed == f"trunk-{head} gamma=5 a.b=0 a.c=0 and 1 more"


# what users set


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", "MLFLOW_TRACKING_URI is ./mlruns, and MLflow keeps no runs in folders"),
        ("file:///x/mlruns", "is file:///x/mlruns, and MLflow keeps no runs in folders"),
        ("127.0.0.1:9", "is 127.0.0.1:9, without its protocol; write http://127.0.0.1:9"),
        ("databricks", "`pip install databricks-sdk`"),
        ("postgresql://u:geheim@127.0.0.1:1/x", "install the database's driver into .venv"),
        ("HTTP://127.0.0.1:9", "Connection refused; start the server"),
    ],
)
@pytest.mark.usefixtures("root")
def test_store_that_is_named_oddly_has_its_remedy(params, monkeypatch, capsys, uri, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with stage_run("check", params):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 320
    assert "geheim" not in line


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [("MLFLOW_EXPERIMENT_NAME", "", "blockdrop"), ("MLFLOW_EXPERIMENT_ID", "0", "Default")],
)
def test_variables_name_the_experiment_as_they_do_in_mlflow(
    client, params, monkeypatch, variable, value, name
):
    monkeypatch.setenv(variable, value)
    with stage_run("check", params) as run:
        pass
    number = client.get_run(run.run_id).info.experiment_id
    assert client.get_experiment(number).name == name


def test_deleted_experiment_is_said_with_what_restores_it(client, params, root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    with stage_run("check", params) as run:
        pass
    message = capsys.readouterr().err
    uri = f"sqlite:///{root}/mlflow.db"
    assert "MLflow can't be used (the experiment 'gone' was deleted in MLflow" in message
    assert f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}" in message
    assert run.run_id == ""
    client.restore_experiment(number)
    with stage_run("check", params) as run:
        pass
    assert run.run_id


def test_user_without_a_name_has_a_number(client, params, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with stage_run("check", params) as run:
        pass
    assert client.get_run(run.parent_id).data.tags["mlflow.user"] == str(os.getuid())


def test_lock_is_open_to_all_users(root, params):
    (root / ".dvc/tmp/mlflow.lock").unlink(missing_ok=True)
    before = os.umask(0o077)
    try:
        with stage_run("check", params):
            pass
    finally:
        os.umask(before)
    assert (root / ".dvc/tmp/mlflow.lock").stat().st_mode & 0o777 == 0o666


@pytest.mark.skipif(os.getuid() != 0, reason="takes root to give a folder to another user")
def test_folder_of_another_user_has_its_commit_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    commit_here()
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 65534, 65534)
    refused = subprocess.run(["git", "status"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert experiment_name({}).startswith("trunk-")


@pytest.mark.skipif(os.getuid() != 0, reason="takes root to give a folder to another user")
def test_repository_of_another_user_runs_no_command(tmp_path, monkeypatch):
    project, command, trace = (tmp_path / name for name in ("project", "command", "trace"))
    project.mkdir()
    command.write_text(f"#!/bin/sh\ntouch {trace}\n")
    command.chmod(0o755)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "file").touch()
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    subprocess.run(["git", "-C", tmp_path, "config", "core.fsmonitor", command], check=True)
    subprocess.run(["git", "-C", tmp_path, "status"], check=True, capture_output=True)
    assert trace.exists()  # its owner's Git does run it
    trace.unlink()
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 65534, 65534)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.chdir(project)
    origin_tags()
    assert not trace.exists()
