"""MLflow that is away: training goes on, says so once, and every point is in MLflow once afterwards.

The server is MLflow's own, in a thread, behind a door that can be shut in many ways.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import experiment_files
import pytest
from builders import enter_project
from mlflow import MlflowClient, set_tracking_uri
from werkzeug.serving import make_server

from pipeline.infra.errors import UserError
from pipeline.tracking import connection, dvc_results, experiment_runs, runs
from pipeline.tracking.connection import TrackingError, http_timeout, masked
from pipeline.tracking.runs import end_orphans, stage_run
from pipeline.tracking.store import ui_address
from tools import sync, ui

NOBODY = 65534
AWAY, BACK = "MLflow can't be reached", "MLflow is back"
ANSWERS = {
    "500": "500 INTERNAL SERVER ERROR",
    "503": "503 SERVICE UNAVAILABLE",
    "401": "401 UNAUTHORIZED",
    "garbage": "200 OK",
}


class Server:
    """MLflow's application, and how it answers: fine, refuse, hang, lost (done, but not said) ..."""

    def __init__(self, application) -> None:
        self.application = application
        self.how = "fine"
        self.calls = 0
        self.delay = 0.0
        self.spoilt = 0  # the number of a call that fails; what it asks for is done if `loses`
        self.loses = False
        self.monkeypatch = None
        self.freed = threading.Event()
        self.listening = None
        self.port = 0
        self.listen()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, environment, start):
        self.calls += 1
        time.sleep(self.delay)
        if self.how == "hang":
            self.freed.wait(60)
        how = "500" if self.spoilt == self.calls and self.how == "fine" else self.how
        if how == "lost" or (how != self.how and self.loses):
            list(self.application(environment, lambda *_, **__: None))
        if how in ("fine", "hang"):
            return self.application(environment, start)
        start(ANSWERS.get(how, ANSWERS["500"]), [("Retry-After", "3600"), ("Content-Length", "4")])
        return [b"<ht>"]

    def listen(self) -> None:
        self.listening = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self.listening.server_port
        threading.Thread(target=self.listening.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, how: str) -> None:
        if self.how == "refuse":
            self.listen()
        self.how = how
        self.calls = self.spoilt = 0
        for name in ("PATIENCE", "SHORT_PATIENCE") if self.monkeypatch else ():
            self.monkeypatch.setattr(runs, name, 1.0 if how == "hang" else 10.0)
        if how == "hang":
            self.freed.clear()
        else:
            self.freed.set()
        if how == "refuse":
            self.listening.shutdown()
            self.listening.server_close()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "server.db"


@pytest.fixture(scope="module")
def started(database):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(database.parent / "artifacts"))
        from mlflow.server import app

        MlflowClient(f"sqlite:///{database}").search_experiments()  # which sets it up
        server = Server(app)
        MlflowClient(server.address).search_experiments()  # at the first call it turns this process's
        set_tracking_uri(None)  # own runs to its database, which they would reach behind the door
        yield server
        server.monkeypatch = None
        server.answer("refuse")


@pytest.fixture
def server(started, tmp_path, monkeypatch) -> Iterator[Server]:
    """The server that runs are logged to, asked at every epoch."""
    enter_project(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.address)
    started.monkeypatch = monkeypatch
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(runs, "CALM", 0.0)
    started.delay = 0.0
    started.answer("fine")
    yield started
    started.answer("fine")


@pytest.fixture
def client(database) -> MlflowClient:
    return MlflowClient(f"sqlite:///{database}")


@pytest.fixture
def params(request) -> dict[str, object]:
    """Other parameters for every test, so another parent."""
    return {"test": request.node.name, "gamma": 2}


def points(client, run_id, name="loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def children(client, parent_id) -> list:
    wanted = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    return client.search_runs([client.get_run(parent_id).info.experiment_id], wanted)


# away, and back


@pytest.mark.parametrize("how", ["refuse", "hang", "500", "503", "401", "garbage", "lost"])
def test_server_that_is_away_for_a_while_has_every_point_once(server, client, params, capsys, how):
    with stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        server.answer(how)
        run.log_metrics({"loss": 2.0}, step=2)
        run.log_metrics({"loss": 3.0}, step=3)
        server.answer("fine")
        run.log_metrics({"loss": 4.0}, step=4)
        assert points(client, run.run_id) == [(step, float(step)) for step in (1, 2, 3, 4)]
    said = capsys.readouterr().err
    assert (said.count(AWAY), said.count(BACK)) == (1, 1)
    assert len(said.splitlines()) == 2  # none of MLflow's own pages
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("how", ["refuse", "hang", "500", "lost"])
def test_server_that_is_away_at_the_start_gets_the_run_later(
    server, client, params, capsys, tmp_path, how
):
    server.answer(how)
    (tmp_path / "curve.csv").write_text("epoch\n")
    with stage_run("pretrain", params) as run:
        assert run.run_id == ""
        run.log_metrics({"loss": 1.0}, step=1)
        run.set_tag("warning", "one policy")
        run.log_artifact(tmp_path / "curve.csv")
        came_back = int(time.time() * 1000)
        time.sleep(0.01)
        server.answer("fine")
        run.log_metrics({"loss": 2.0}, step=2)
        assert run.run_id != ""
    made = client.get_run(run.run_id)
    assert points(client, run.run_id) == [(1, 1.0), (2, 2.0)]
    assert client.get_metric_history(run.run_id, "loss")[0].timestamp < came_back
    assert made.info.start_time < came_back
    assert made.data.params == {"test": params["test"], "gamma": "2"}
    assert client.get_run(run.parent_id).data.params == made.data.params
    assert made.data.tags["warning"] == "one policy"
    assert made.info.status == client.get_run(run.parent_id).info.status == "FINISHED"
    assert MlflowClient().list_artifacts(run.run_id)[0].path == "curve.csv"
    assert len(children(client, run.parent_id)) == 1
    said = capsys.readouterr().err
    assert (said.count(AWAY), said.count(BACK)) == (1, 1)


@pytest.mark.parametrize("call", range(1, 12))
def test_answer_that_is_lost_makes_no_second_run(server, client, params, call):
    """Whichever of the calls at the opening it is."""
    server.spoilt, server.loses = call, True
    with stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
    assert server.calls > call
    assert [child.info.run_id for child in children(client, run.parent_id)] == [run.run_id]
    wanted = f"tags.`blockdrop.role` = 'parent' and params.test = '{params['test']}'"
    experiment = client.get_run(run.run_id).info.experiment_id
    assert len(client.search_runs([experiment], wanted)) == 1
    for run_id in (run.run_id, run.parent_id):
        assert client.get_run(run_id).data.params == {"test": params["test"], "gamma": "2"}
        assert client.get_run(run_id).info.status == "FINISHED"
    assert points(client, run.run_id) == [(1, 1.0)]


def test_server_that_comes_when_the_stage_is_done_gets_all(server, client, params, monkeypatch):
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 1000.0)
    server.answer("refuse")
    with stage_run("pretrain", params) as run:
        for step in range(1500):
            run.log_metrics({"loss": 0.5}, step=step)
        server.answer("fine")
    assert len(points(client, run.run_id)) == 1500
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("call", range(1, 12))
def test_resumed_run_is_gone_on_with_whichever_call_fails(server, client, params, call):
    with stage_run("pretrain", params) as first:
        first.log_metrics({"loss": 1.0}, step=1)
    server.calls = 0
    server.spoilt, server.loses = call, False
    with stage_run("pretrain", params, resumed=first.run_id) as run:
        run.log_metrics({"loss": 2.0}, step=2)
    assert run.run_id == first.run_id
    assert points(client, run.run_id) == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.serial
def test_slow_server_gets_a_large_backlog_in_pieces(server, client, params, monkeypatch, capsys):
    with stage_run("pretrain", params) as run:
        monkeypatch.setattr(runs, "BATCH", 10)
        monkeypatch.setattr(runs, "FLUSH_SECONDS", 1000.0)
        for step in range(100):
            run.log_metrics({"loss": 0.5}, step=step)
        monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
        monkeypatch.setattr(runs, "PATIENCE", 0.3)
        server.delay = 0.2
        began = time.monotonic()
        run.log_metrics({"loss": 0.5}, step=100)
        assert time.monotonic() - began < 2
        assert 0 < len(points(client, run.run_id)) < 101
        server.delay = 0.0
    assert len(points(client, run.run_id)) == 101
    assert capsys.readouterr().err == ""


# what it costs


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time = time.time

    def monotonic(self) -> float:
        return self.now


def attempts(monkeypatch, tmp_path, *, hours: float, takes: float, works: bool) -> tuple[list, float]:
    """When a training with an epoch a second asks MLflow, and the seconds that it waits for it."""
    enter_project(tmp_path, monkeypatch)
    clock, asked = Clock(), []
    monkeypatch.setattr(runs, "time", clock)

    def ask(self, until):
        asked.append(clock.now - 1000)
        clock.now += takes
        if not works:
            raise OSError("away")

    monkeypatch.setattr(runs.StageRun, "_log_waiting", ask)
    run = runs.StageRun("pretrain", {})
    run.open()
    while clock.now < 1000 + hours * 3600:
        run.log_metrics({"loss": 1.0})
        clock.now += 1
    return asked, takes * len(asked)


def test_attempts_become_rare_while_a_server_is_away(monkeypatch, tmp_path):
    asked, _ = attempts(monkeypatch, tmp_path, hours=1, takes=0.0, works=False)
    waits = [round(later - earlier) for earlier, later in itertools.pairwise(asked)]
    assert waits == [31, 61, 121, 241, 481, 601, 601, 601, 601]


@pytest.mark.parametrize("works", [True, False])
def test_slow_server_costs_a_twentieth_of_a_training(monkeypatch, tmp_path, works):
    asked, waited = attempts(monkeypatch, tmp_path, hours=5, takes=10.0, works=works)
    assert len(asked) > 10
    assert waited < 0.05 * 5 * 3600


def test_hanging_server_is_asked_once_at_the_start_and_once_at_the_end(
    server, params, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 1000.0)
    server.answer("hang")
    began = time.monotonic()
    with stage_run("pretrain", params) as run:
        for step in range(100):
            run.log_metrics({"loss": 1.0}, step=step)
    assert time.monotonic() - began < 4
    assert server.calls == 2
    assert capsys.readouterr().err.count(AWAY) == 1


def test_server_that_hangs_at_the_end_is_asked_once(server, params, monkeypatch):
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 1000.0)
    with stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        server.answer("hang")
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert server.calls == 1


def test_real_patience_with_a_hanging_server_is_seconds():
    assert runs.PATIENCE + runs.SHORT_PATIENCE <= 20
    assert runs.LAST_PATIENCE <= 3


def test_interrupted_stage_does_not_wait_for_a_hanging_server(server, params, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the user's own
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    began = []

    def interrupted() -> None:
        with stage_run("pretrain", params) as run:
            run.log_metrics({"loss": 1.0}, step=1)
            monkeypatch.setattr(runs, "FLUSH_SECONDS", 1000.0)
            run.log_metrics({"loss": 2.0}, step=2)
            server.answer("hang")
            began.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began[0] < 4
    assert server.calls == 1
    assert f"{AWAY} (timed out)" in capsys.readouterr().err  # and not (KeyboardInterrupt)


def test_users_own_patience_counts_and_is_left_as_it_was(server, params, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    before = {name: text for name, text in os.environ.items() if name.startswith("MLFLOW")}
    server.answer("503")  # come again in an hour, it says
    run = runs.StageRun("pretrain", params)
    run.open()
    assert server.calls == 3
    server.answer("refuse")
    run.open()
    assert not [line for line in caplog.records if line.name.startswith(("urllib3", "mlflow"))]
    assert {name: text for name, text in os.environ.items() if name.startswith("MLFLOW")} == before


def test_patience_is_mlflows_own_afterwards(monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    with http_timeout(2.5):
        assert TIMEOUT.get() == 2
    assert TIMEOUT.get() == 120


# a file that can't be used


@pytest.fixture
def place(database, started, monkeypatch, tmp_path):
    """A folder with a store, and where tests run as root another user, for whom modes count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for made in (folder, folder / "project/.dvc/tmp", folder / "store"):
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o777)
        shutil.copyfile(database, folder / "store/mlflow.db")
        (folder / "store/mlflow.db").chmod(0o666)
        enter_project(folder / "project", monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/store/mlflow.db")
        monkeypatch.setattr(connection, "SQLITE_PATIENCE", 0.3)
        monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
        monkeypatch.setattr(runs, "CALM", 0.0)
        be_another_user()
        yield folder
        be_oneself()
        (folder / "store").chmod(0o777)


def be_another_user() -> None:
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)


def be_oneself() -> None:
    if os.getresuid()[2] == 0:
        os.setresuid(0, 0, 0)


def spoil(folder: Path, how: str) -> str:
    """Make the store unusable; what is to be said of it."""
    file = folder / "store/mlflow.db"
    be_oneself()
    try:
        return spoilt(file, how)
    finally:
        be_another_user()


def spoilt(file: Path, how: str) -> str:
    if how == "read-only file":
        file.chmod(0o444)
        return "mlflow.db can't be written to"
    if how == "read-only folder":
        file.parent.chmod(0o555)
        return "store can't be written to"
    if how == "no database":
        file.write_bytes(b"no database, and longer than the header of one" * 100)
        return "file is not a database"
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        opened.commit()
    return "database schema"


SPOILT = ["read-only file", "read-only folder", "no database", "newer schema"]


@pytest.mark.parametrize("how", SPOILT)
def test_file_that_can_not_be_used_is_said_once_and_stops_nothing(place, params, capsys, how):
    reason = spoil(place, how)
    began = time.monotonic()
    with stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
    assert time.monotonic() - began < 3
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == said.count(AWAY) == 1


@pytest.mark.parametrize("how", SPOILT)
def test_file_that_can_not_be_used_ends_a_strict_stage(place, params, monkeypatch, how):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    reason = spoil(place, how)
    with pytest.raises(TrackingError, match=reason), stage_run("pretrain", params):
        pytest.fail("the stage began")


@pytest.mark.serial
def test_locked_file_gets_every_point_when_it_is_free(place, params, capsys):
    file = place / "store/mlflow.db"
    with (
        contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other,
        stage_run("pretrain", params) as run,
    ):
        run.log_metrics({"loss": 1.0}, step=1)
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        run.log_metrics({"loss": 2.0}, step=2)
        assert time.monotonic() - began < 1.5
        other.execute("ROLLBACK")
        run.log_metrics({"loss": 3.0}, step=3)
    found = MlflowClient(f"sqlite:///{file}")
    assert points(found, run.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    said = capsys.readouterr().err
    assert "database is locked" in said
    assert (said.count(AWAY), said.count(BACK)) == (1, 1)


def test_file_that_is_locked_at_the_start_gets_the_run_later(place, params):
    file = place / "store/mlflow.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with stage_run("pretrain", params) as run:
            run.log_metrics({"loss": 1.0}, step=1)
            assert time.monotonic() - began < 3
            other.execute("ROLLBACK")
    assert points(MlflowClient(f"sqlite:///{file}"), run.run_id) == [(1, 1.0)]


# strict, and what the variable may say


def test_strict_stage_ends_before_it_begins(server, params, monkeypatch):
    server.answer("refuse")
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    uri = server.address.replace("//", "//me:hidden@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError) as caught, stage_run("pretrain", params):
        pytest.fail("the stage began")
    said = str(caught.value)
    assert "hidden" not in said
    for part in (
        uri.replace("hidden", "***"),
        "refused",
        "start the server",
        "unset BLOCKDROP_TRACKING",
    ):
        assert part in said
    assert isinstance(caught.value, UserError)


def test_strict_stage_ends_at_the_flush_that_failed(server, client, params, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    ended = []

    def train() -> None:
        with stage_run("pretrain", params) as run:
            ended.append(run.run_id)
            run.log_metrics({"loss": 1.0}, step=1)
            server.answer("503")
            run.log_metrics({"loss": 2.0}, step=2)
            pytest.fail("the stage went on")

    with pytest.raises(TrackingError, match="503"):
        train()
    assert capsys.readouterr().err == ""  # the error says it
    assert points(client, ended[0]) == [(1, 1.0)]


def test_strict_stage_fails_when_the_server_dies_at_its_end(server, params, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    with pytest.raises(TrackingError), stage_run("pretrain", params):
        server.answer("refuse")


def test_strict_stage_that_fails_otherwise_says_that(server, params, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")

    def fail() -> None:
        with stage_run("pretrain", params):
            server.answer("refuse")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_strict_stage_with_a_server_is_as_any_other(server, client, params, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "strict")
    with stage_run("pretrain", params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("value", ["OFF", "Strict", "no", " "])
def test_other_value_of_the_variable_is_refused_with_the_choices(server, params, monkeypatch, value):
    monkeypatch.setenv("BLOCKDROP_TRACKING", value)
    with pytest.raises(UserError) as caught, stage_run("pretrain", params):
        pytest.fail("the stage began")
    for part in ("BLOCKDROP_TRACKING", repr(value), "off", "strict", "unset"):
        assert part in str(caught.value)
    with pytest.raises(SystemExit, match="BLOCKDROP_TRACKING"):
        sync.main()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:p4ss@host:5000/api", "at http://me:***@host:5000/api"),
        ("postgresql://me:p@ss/w@host/db", "postgresql://me:***@host/db"),
        ("https://token@host/x", "https://***@host/x"),
        ("mysql://host/db?user=me&password=p4ss&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("http://127.0.0.1:5000/api?name=blockdrop", "http://127.0.0.1:5000/api?name=blockdrop"),
        ("models:/blockdrop@champion", "models:/blockdrop@champion"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_passwords_are_masked(text, shown):
    assert masked(text) == shown


def test_sync_and_links_show_no_password(server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@127.0.0.1:9")
    assert ui_address() == "http://127.0.0.1:9"
    with pytest.raises(SystemExit), sync.usable_store():
        MlflowClient("http://me:hidden@127.0.0.1:9").search_experiments()
    said = capsys.readouterr().err
    assert "hidden" not in said
    assert "me:***@127.0.0.1:9" in said


def test_missing_password_is_named(server, params, capsys):
    server.answer("401")
    with stage_run("pretrain", params):
        pass
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in capsys.readouterr().err


# what `make sync` does then


def record_of(folder: Path, name: str) -> dvc_results.Record:
    experiment_files.write(folder, model=False)
    rows = ["epoch,validation_accuracy", "1,0.5", "2,0.75"]
    for file in ("plots/finetune.csv", "plots/sole/20.csv", "plots/static/first-1.csv"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(rows) + "\n")
    with (folder / "params.yaml").open("a") as file:
        file.write("sole: {depths: [20]}\nstatic: {rules: [first], kept: [1]}\n")
    files = dvc_results.work_tree(str(folder))
    return dvc_results.read(files, name=name, baseline="abc", revision="r1")


def enter_experiment(monkeypatch, name: str) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", name)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")


ROWS = [{"epoch": 1, "validation_accuracy": 0.5}, {"epoch": 2, "validation_accuracy": 0.75}]
CURVE = [(1, 0.5), (2, 0.75)]


def test_server_that_was_away_has_all_curves_after_the_sync(server, client, tmp_path, monkeypatch):
    enter_experiment(monkeypatch, "was-away")
    record = record_of(tmp_path, "was-away")
    server.answer("refuse")
    for stage in ("finetune", "sole-20", "static-first-1"):
        with stage_run(stage, record.params) as run:
            for row in ROWS:
                run.log_metrics(row, step=row["epoch"])
    server.answer("fine")
    parent = client.get_run(experiment_runs.complete(record, finish=True))
    for stage in ("finetune", "sole-20", "static-first-1"):
        assert points(client, parent.info.run_id, f"{stage}/validation_accuracy") == CURVE
    assert parent.data.metrics.items() >= record.metrics.items()


@pytest.mark.parametrize("logged", [0, 1, 2])
def test_training_that_lost_the_server_is_completed_by_the_sync(
    server, client, tmp_path, monkeypatch, logged
):
    name = f"lost-{logged}"
    enter_experiment(monkeypatch, name)
    record = record_of(tmp_path, name)
    with stage_run("finetune", record.params) as run:
        for row in ROWS[:logged]:
            run.log_metrics(row, step=row["epoch"])
        server.answer("500")
        for row in ROWS[logged:]:
            run.log_metrics(row, step=row["epoch"])
    server.answer("fine")
    client.set_tag(run.run_id, "blockdrop.process", f"{os.uname().nodename} 1 1.0")  # it has died since
    assert end_orphans(client, client.get_run(run.run_id).info.experiment_id) == [run.run_id]
    for _ in range(2):
        assert experiment_runs.complete(record, finish=True) == run.parent_id
        assert points(client, run.run_id, "validation_accuracy") == CURVE
        assert points(client, run.run_id, "epoch") == [(1, 1.0), (2, 2.0)]
        assert client.get_run(run.run_id).info.status == "FINISHED"


def test_attempt_that_learnt_otherwise_is_left_as_it_is(server, client, tmp_path, monkeypatch):
    enter_experiment(monkeypatch, "other")
    record = record_of(tmp_path, "other")
    with stage_run("finetune", record.params) as run:
        run.log_metrics({"epoch": 1, "validation_accuracy": 0.25}, step=1)
    client.set_terminated(run.run_id, "KILLED")
    experiment_runs.complete(record, finish=True)
    assert points(client, run.run_id, "validation_accuracy") == [(1, 0.25)]
    assert client.get_run(run.run_id).info.status == "KILLED"


def test_sync_that_lost_the_server_logs_no_point_twice(server, client, tmp_path, monkeypatch):
    record = record_of(tmp_path, "sync")
    real = MlflowClient.log_batch

    def lose(self, *arguments, **options):
        real(self, *arguments, **options)
        if options.get("metrics"):
            raise OSError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose)
        with pytest.raises(OSError, match="lost"):
            experiment_runs.complete(record, finish=True)
    run_id = experiment_runs.complete(record, finish=True)
    assert points(client, run_id, "finetune/validation_accuracy") == CURVE
    assert points(client, run_id, "accuracy") == [(0, 0.9)]


# servers that we start


def test_ui_listens_on_this_machine_alone_unless_told_otherwise(server, monkeypatch):
    commands = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hidden@host/db")
    monkeypatch.setattr(ui, "sync", lambda root: sync.Outcome(run_id="", failed=()))
    monkeypatch.setattr(ui.overview, "say", lambda *_, **__: None)
    monkeypatch.setattr(ui.subprocess, "run", lambda command, **_: commands.append(command))
    for own in ([], ["--host", "0.0.0.0"]):
        monkeypatch.setattr(sys, "argv", ["ui", "--port", "0", *own])
        ui.main()
    hosts = [command[command.index("--host") + 1] for command in commands]
    assert hosts == ["127.0.0.1", "0.0.0.0"]
    assert "hidden" not in repr(commands)  # what `ps` shows


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


# a real server


@contextlib.contextmanager
def real_server(folder: Path, port: int):
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/real.db"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(Exception), http_timeout(5), connection.silence_mlflow():
                MlflowClient(f"http://127.0.0.1:{port}").search_experiments()
                break
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_real_server_that_is_killed_and_started_again_has_every_point_once(
    tmp_path, monkeypatch, capsys
):
    enter_project(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(runs, "CALM", 0.0)
    done = 0
    with contextlib.ExitStack() as stage:
        for _ in range(2):
            with real_server(tmp_path, port):
                if not done:
                    run = stage.enter_context(stage_run("pretrain", {"seed": 0}))
                for step in range(done, done + 20):
                    run.log_metrics({"loss": float(step)}, step=step)
            for step in range(done + 20, done + 24):
                run.log_metrics({"loss": float(step)}, step=step)
            done += 24
        with real_server(tmp_path, port):
            stage.close()
            client = MlflowClient(f"http://127.0.0.1:{port}")
            assert points(client, run.run_id) == [(i, float(i)) for i in range(done)]
            assert client.get_run(run.run_id).info.status == "FINISHED"
    said = capsys.readouterr().err
    assert (said.count(AWAY), said.count(BACK)) == (2, 2)
