"""MLflow that is away: a stage says so once and goes on, and `make sync` logs what is missing."""

import contextlib
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import experiment_files
import pytest
from builders import enter_project
from mlflow import MlflowClient, set_tracking_uri
from mlflow_server import Clock, Server

from pipeline.infra.errors import UserError
from pipeline.tracking import connection, dvc_results, experiment_runs, runs
from pipeline.tracking.connection import TrackingError, http_timeout, masked
from pipeline.tracking.runs import StageRun, end_orphans, stage_run
from pipeline.tracking.store import ui_address
from pipeline.tracking.units import readable
from tools import sync, ui

NOBODY = 65534
AWAY = "MLflow can't be reached"


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "server.db"


@pytest.fixture(scope="module")
def started(database) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(database.parent / "artifacts"))
        from mlflow.server import app

        MlflowClient(f"sqlite:///{database}").search_experiments()  # which sets it up
        server = Server(app)
        MlflowClient(server.address).search_experiments()  # the first call turns this process's own runs
        set_tracking_uri(None)  # to the server's database, where they would pass by the server
        yield server
        server.set("refuse")


@pytest.fixture
def server(started, tmp_path, monkeypatch) -> Iterator[Server]:
    """The server that runs are logged to, at every epoch."""
    enter_project(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.address)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(runs, "FLUSH_SHARE", 0.0)
    started.set("fine")
    yield started
    started.set("fine")


@pytest.fixture
def client(database) -> MlflowClient:
    return MlflowClient(f"sqlite:///{database}")


@pytest.fixture
def params(request) -> dict[str, object]:
    """Other parameters for every test, so another parent."""
    return {"test": request.node.name, "gamma": 2}


def points(client, run_id, name="loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def log(run, *steps: int) -> None:
    for step in steps:
        run.log_metrics({"loss": float(step)}, step=step)


# a stage whose server fails


@pytest.mark.parametrize("mode", ["refuse", "hang", "503", "401", "garbage", "lost"])
def test_failing_server_is_said_once_and_asked_by_the_next_stage(
    server, client, params, monkeypatch, capsys, mode
):
    monkeypatch.setattr(runs, "TIMEOUT", 1.0 if mode == "hang" else 10.0)
    with stage_run("pretrain", params) as run:
        log(run, 1)
        server.set(mode)
        began = time.monotonic()
        log(run, 2, 3)
        assert time.monotonic() - began < 5
        assert server.calls == (0 if mode == "refuse" else 1)
        server.set("fine")
        log(run, 4)
    assert server.calls == 0  # it is asked no more
    message = capsys.readouterr().err
    assert message.count("\n") == message.count(AWAY) == 1  # and none of MLflow's own pages
    password = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    assert (password in message) == (mode == "401")
    assert points(client, run.run_id) == [(1, 1.0), (2, 2.0)][: 2 if mode == "lost" else 1]
    with stage_run("curriculum", params) as following:
        log(following, 1)
    assert points(client, following.run_id) == [(1, 1.0)]
    assert following.parent_id == run.parent_id
    assert client.get_run(run.parent_id).info.status == "FINISHED"


@pytest.mark.parametrize("mode", ["refuse", "hang"])
def test_server_that_is_away_at_the_start_is_asked_once(
    server, params, tmp_path, monkeypatch, capsys, mode
):
    monkeypatch.setattr(runs, "TIMEOUT", 1.0)
    server.set(mode)
    began = time.monotonic()
    with stage_run("pretrain", params) as run:
        log(run, 1, 2)
        run.set_tag("warning", "one policy")
        run.log_artifact(tmp_path)
    assert time.monotonic() - began < 4
    assert run.run_id == ""
    assert server.calls == (1 if mode == "hang" else 0)
    assert capsys.readouterr().err.count(AWAY) == 1


@pytest.mark.parametrize("call", range(1, 12))
def test_answer_that_is_lost_makes_no_second_parent(server, client, params, call):
    """Whichever of the calls at the opening it is."""
    server.failing_call = call
    with stage_run("pretrain", params):
        pass
    assert server.calls == call
    server.set("fine")
    with stage_run("pretrain", params) as run:
        log(run, 1)
    condition = f"tags.`blockdrop.role` = 'parent' and params.test = '{params['test']}'"
    parents = client.search_runs([client.get_run(run.run_id).info.experiment_id], condition)
    assert [parent.info.run_id for parent in parents] == [run.parent_id]
    for run_id in (run.run_id, run.parent_id):
        assert client.get_run(run_id).data.params == {"test": params["test"], "gamma": "2"}


@pytest.mark.parametrize("mode", ["503", "lost"])
def test_resumed_run_has_every_point_once_after_an_outage(server, client, params, mode):
    def interrupted() -> None:
        with stage_run("pretrain", params) as run:
            ids.append(run.run_id)
            log(run, 1, 2)
            server.set(mode)
            log(run, 3)
            raise KeyboardInterrupt

    ids: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    server.set("fine")
    with stage_run("pretrain", params, resumed=ids[0]) as run:
        log(run, 1, 2, 3, 4)  # a resumed training logs all its epochs
    assert run.run_id == ids[0]
    assert points(client, run.run_id) == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_slow_server_costs_a_twentieth_of_a_training(tmp_path, monkeypatch):
    enter_project(tmp_path, monkeypatch)
    clock, seconds_of_a_call, num_calls = Clock(), 10.0, 0
    monkeypatch.setattr(runs, "time", clock)

    class SlowClient:
        def log_batch(self, run_id, metrics):
            nonlocal num_calls
            num_calls += 1
            clock.now += seconds_of_a_call

    run = StageRun("pretrain", {})
    run._client = SlowClient()
    while clock.now < 1000 + 5 * 3600:
        run.log_metrics({"loss": 1.0})
        clock.now += 1  # an epoch
    assert num_calls > 10
    assert seconds_of_a_call * num_calls < 0.05 * 5 * 3600


def test_real_timeouts_are_seconds():
    assert runs.TIMEOUT <= 10
    assert runs.KILLED_TIMEOUT <= 3


def test_interrupted_stage_does_not_wait_for_a_hanging_server(server, params, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the user's own
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    began = []

    def interrupted() -> None:
        with stage_run("pretrain", params):
            server.set("hang")
            began.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began[0] < 4
    assert server.calls == 1
    assert f"{AWAY} (timed out)" in capsys.readouterr().err  # and not (KeyboardInterrupt)


def test_http_timeout_keeps_the_users_values_and_restores_them(server, params, monkeypatch, caplog):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    with http_timeout(2.5):
        assert TIMEOUT.get() == 2
    assert TIMEOUT.get() == 120  # MLflow's own
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    before = {name: text for name, text in os.environ.items() if name.startswith("MLFLOW")}
    server.set("503")  # "come again in an hour"
    StageRun("pretrain", {}).open()
    assert server.calls == 3
    assert not [line for line in caplog.records if line.name.startswith(("urllib3", "mlflow"))]
    assert {name: text for name, text in os.environ.items() if name.startswith("MLFLOW")} == before


# a file that can't be used


@pytest.fixture
def folder(database, started, monkeypatch) -> Iterator[Path]:
    """A folder with a store; where tests run as root they are another user, for whom modes count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (folder, folder / "project/.dvc/tmp", folder / "store"):
            part.mkdir(parents=True, exist_ok=True)
            part.chmod(0o777)
        shutil.copyfile(database, folder / "store/mlflow.db")
        (folder / "store/mlflow.db").chmod(0o666)
        enter_project(folder / "project", monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/store/mlflow.db")
        monkeypatch.setattr(connection, "SQLITE_TIMEOUT", 0.3)
        monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
        monkeypatch.setattr(runs, "FLUSH_SHARE", 0.0)
        yield folder
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)
        (folder / "store").chmod(0o777)


def damage(file: Path, kind: str) -> str:
    """Make the store unusable; what the message must say of it."""
    if kind == "read-only file":
        file.chmod(0o444)
        return "mlflow.db can't be written to"
    if kind == "read-only folder":
        file.parent.chmod(0o555)
        return "store can't be written to"
    if kind == "no database":
        file.write_bytes(b"no database, and longer than the header of one" * 100)
        return "file is not a database"
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        opened.commit()
    return "database schema"


@pytest.mark.parametrize(
    ("kind", "strict"),
    [("read-only file", False), ("read-only folder", False), ("no database", False),
     ("newer schema", False), ("read-only file", True)],
)  # fmt: skip
def test_unusable_file_is_said_once_and_stops_strict_stages(
    folder, params, monkeypatch, capsys, kind, strict
):
    reason = damage(folder / "store/mlflow.db", kind)
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)
    if strict:
        monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
        with pytest.raises(TrackingError, match=reason), stage_run("pretrain", params):
            pytest.fail("the stage began")
        return
    with stage_run("pretrain", params) as run:
        log(run, 1)
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == message.count(AWAY) == 1


@pytest.mark.serial
def test_locked_file_is_waited_for_once(folder, params, capsys):
    file = folder / "store/mlflow.db"
    with (
        contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other,
        stage_run("pretrain", params) as run,
    ):
        log(run, 1)
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        log(run, 2, 3)
        assert time.monotonic() - began < 1.5
        other.execute("ROLLBACK")
    assert points(MlflowClient(f"sqlite:///{file}"), run.run_id) == [(1, 1.0)]
    message = capsys.readouterr().err
    assert "database is locked" in message
    assert message.count(AWAY) == 1


# strict, and other values of the variable


def test_strict_stage_ends_before_it_begins(server, params, monkeypatch):
    server.set("refuse")
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    uri = server.address.replace("//", "//me:hidden@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError) as caught, stage_run("pretrain", params):
        pytest.fail("the stage began")
    message = str(caught.value)
    assert "hidden" not in message
    shown = uri.replace("hidden", "***")
    for part in (shown, "refused", "start the server", "unset BLOCKDROP_TRACKING"):
        assert part in message
    assert isinstance(caught.value, UserError)


def test_strict_stage_ends_at_the_flush_that_failed(server, client, params, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    ids = []

    def train() -> None:
        with stage_run("pretrain", params) as run:
            ids.append(run.run_id)
            log(run, 1)
            server.set("503")
            log(run, 2)
            pytest.fail("the stage went on")

    with pytest.raises(TrackingError, match="503"):
        train()
    assert capsys.readouterr().err == ""  # the error says it
    assert points(client, ids[0]) == [(1, 1.0)]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_strict_stage_fails_at_its_end_but_hides_no_error(server, params, monkeypatch, error):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")

    def end() -> None:
        with stage_run("pretrain", params):
            server.set("refuse")
            if error:
                raise error

    with pytest.raises(error or TrackingError):
        end()


def test_strict_stage_with_a_server_finishes(server, client, params, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    with stage_run("pretrain", params) as run:
        log(run, 1)
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("value", ["OFF", " "])
def test_other_value_of_the_variable_is_refused_with_the_choices(server, params, monkeypatch, value):
    monkeypatch.setenv("BLOCKDROP_TRACKING", value)
    with pytest.raises(UserError) as caught, stage_run("pretrain", params):
        pytest.fail("the stage began")
    for part in ("BLOCKDROP_TRACKING", repr(value), "off", "strict", "unset"):
        assert part in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["sync"])
    with pytest.raises(SystemExit, match="BLOCKDROP_TRACKING"):
        sync.main()


# passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:p4ss@host:5000/api", "at http://me:***@host:5000/api"),
        ("postgresql://me:p@ss/w@host/db", "postgresql://me:***@host/db"),
        ("https://token@host/x", "https://***@host/x"),
        ("mysql://host/db?user=me&password=p4ss&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("http://127.0.0.1:5000/api?name=blockdrop", "http://127.0.0.1:5000/api?name=blockdrop"),
        ("models:/blockdrop@champion", "models:/blockdrop@champion"),
    ],
)
def test_passwords_are_masked(text, shown):
    assert masked(text) == shown


def test_sync_and_links_show_no_password(server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@127.0.0.1:9")
    assert ui_address() == "http://127.0.0.1:9"
    with pytest.raises(SystemExit), sync.usable_store():
        MlflowClient("http://me:hidden@127.0.0.1:9").search_experiments()
    message = capsys.readouterr().err
    assert "hidden" not in message
    assert "me:***@127.0.0.1:9" in message


# what `make sync` logs afterwards

TRAININGS = ("finetune", "sole-20", "static-first-1")
ROWS = [{"epoch": 1, "validation_accuracy": 0.5}, {"epoch": 2, "validation_accuracy": 0.75}]
CURVE = [(1, 0.5), (2, 0.75)]


@pytest.fixture
def record(tmp_path, monkeypatch, request) -> dvc_results.Record:
    """A finished experiment, named as the test, within which stages run here."""
    name = request.node.name
    monkeypatch.setenv("DVC_EXP_NAME", name)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")
    experiment_files.write(tmp_path, model=False)
    for file in ("plots/finetune.csv", "plots/sole/20.csv", "plots/static/first-1.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("epoch,validation_accuracy\n1,0.5\n2,0.75\n")
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("sole: {depths: [20]}\nstatic: {rules: [first], num_kept: [1]}\n")
    files = dvc_results.work_tree(str(tmp_path))
    return dvc_results.read(files, name=name, baseline="abc", revision="r1")


def test_server_that_was_away_has_all_curves_after_the_sync(server, client, record):
    server.set("refuse")
    for stage in TRAININGS:
        with stage_run(stage, record.params) as run:
            for row in ROWS:
                run.log_metrics(row, step=row["epoch"])
    server.set("fine")
    parent = client.get_run(experiment_runs.complete(record, finish=True))
    for stage in TRAININGS:
        assert points(client, parent.info.run_id, f"{stage}/validation_accuracy") == CURVE
    assert parent.data.metrics.items() >= readable(record.metrics).items()


@pytest.mark.parametrize("logged", [0, 1, 2])
def test_training_that_lost_the_server_is_completed_by_the_sync(server, client, record, logged):
    with stage_run("finetune", record.params) as run:
        for row in ROWS[:logged]:
            run.log_metrics(row, step=row["epoch"])
        server.set("500")
        for row in ROWS[logged:]:
            run.log_metrics(row, step=row["epoch"])
    server.set("fine")
    client.set_tag(run.run_id, runs.TAG_PROCESS, f"{os.uname().nodename} 1 1.0")  # it has ended since
    assert end_orphans(client, client.get_run(run.run_id).info.experiment_id) == [run.run_id]
    for _ in range(2):
        assert experiment_runs.complete(record, finish=True) == run.parent_id
        assert points(client, run.run_id, "validation_accuracy") == CURVE
        assert points(client, run.run_id, "epoch") == [(1, 1.0), (2, 2.0)]
        for run_id in (run.run_id, run.parent_id):
            assert client.get_run(run_id).info.status == "FINISHED"


def test_attempt_with_other_points_is_left_as_it_is(server, client, record):
    with stage_run("finetune", record.params) as run:
        run.log_metrics({"epoch": 1, "validation_accuracy": 0.25}, step=1)
    client.set_terminated(run.run_id, "KILLED")
    experiment_runs.complete(record, finish=True)
    assert points(client, run.run_id, "validation_accuracy") == [(1, 0.25)]
    assert client.get_run(run.run_id).info.status == "KILLED"


def test_sync_that_lost_the_server_logs_no_point_twice(server, client, record):
    real = MlflowClient.log_batch

    def lose(self, *arguments, **options):
        real(self, *arguments, **options)
        if options.get("metrics"):
            raise OSError("the answer was lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose)
        with pytest.raises(OSError, match="lost"):
            experiment_runs.complete(record, finish=True)
    run_id = experiment_runs.complete(record, finish=True)
    assert points(client, run_id, "finetune/validation_accuracy") == CURVE
    assert points(client, run_id, "accuracy") == [(0, 0.9)]


# the UI


def test_ui_listens_on_this_machine_alone_unless_told_otherwise(server, monkeypatch):
    commands = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hidden@host/db")
    monkeypatch.setattr(ui, "sync", lambda root: sync.Outcome(run_id="", failed=()))
    monkeypatch.setattr(ui.overview, "say", lambda *_, **__: None)
    monkeypatch.setattr(ui.subprocess, "run", lambda command, **_: commands.append(command))
    for options in ([], ["--host", "0.0.0.0"]):
        monkeypatch.setattr(sys, "argv", ["ui", "--port", "0", *options])
        ui.main()
    hosts = [command[command.index("--host") + 1] for command in commands]
    assert hosts == ["127.0.0.1", "0.0.0.0"]
    assert "hidden" not in repr(commands)  # which `ps` shows


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", None), ("no.such.host.invalid", 1), ("", 99999)]
)
def test_port_that_can_not_be_had_is_said_before_the_sync(server, monkeypatch, host, port):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(ui, "sync", lambda root: pytest.fail("it was synced"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        monkeypatch.setattr(sys, "argv", ["ui", "--host", host, "--port", str(port)])
        with pytest.raises(SystemExit, match=f"port {port} .*PORT="):
            ui.main()
