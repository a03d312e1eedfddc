"""The machine's load is sampled by a training's steps: nothing of it outlives, delays or stops one."""

import math
import threading

import pytest
from builders import enter_project
from mlflow import MlflowClient
from mlflow_server import Clock

from pipeline.infra.errors import UserError
from pipeline.tracking import runs, system_metrics
from pipeline.tracking.runs import stage_run
from pipeline.tracking.store import store
from pipeline.tracking.system_metrics import INTERVAL, SWITCH, SystemMetrics, sampling_interval
from stages.support.progress import Progress

LOAD = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in (SWITCH, INTERVAL):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    clock.time = lambda: clock.now
    monkeypatch.setattr(system_metrics, "time", clock)
    return clock


def test_samples_are_taken_when_it_is_time(clock):
    load = SystemMetrics(10.0)
    taken = []
    for _ in range(25):
        taken += load.sample()
        clock.now += 1
    assert {metric.key for metric in taken} >= LOAD  # and a GPU's, where there is one
    cpu = [metric for metric in taken if metric.key == "system/cpu_utilization_percentage"]
    assert [metric.step for metric in cpu] == [0, 1]
    assert cpu[1].timestamp - cpu[0].timestamp == 10_000
    assert all(0 <= metric.value <= 100 for metric in cpu)


@pytest.mark.parametrize("present", [True, False])
def test_gpu_is_sampled_where_there_is_one_and_not_missed_elsewhere(clock, monkeypatch, capfd, present):
    class Monitor:
        def __init__(self) -> None:
            if not present:
                raise ImportError("`nvidia-ml-py` is not installed")

        def collect_metrics(self) -> None: ...
        def clear_metrics(self) -> None: ...
        def aggregate_metrics(self) -> dict[str, float]:
            return {"gpu_0_utilization_percentage": 50}

    monkeypatch.setattr("mlflow.system_metrics.metrics.gpu_monitor.GPUMonitor", Monitor)
    load = SystemMetrics(1.0)
    clock.now += 1
    values = {metric.key: metric.value for metric in load.sample()}
    assert values.get("system/gpu_0_utilization_percentage") == (50.0 if present else None)
    assert values.keys() >= LOAD
    assert capfd.readouterr() == ("", "")


def test_counter_that_can_not_be_read_is_left_out(clock, monkeypatch):
    def fail() -> None:
        raise RuntimeError("the driver is gone")

    load = SystemMetrics(1.0)
    monkeypatch.setattr(load._monitors[0], "collect_metrics", fail)
    clock.now += 1
    assert not {metric.key for metric in load.sample()} & LOAD


@pytest.mark.parametrize(("switch", "interval", "seconds"), [
    ("", "", 10), ("true", "2.5", 2.5), ("FALSE", "", math.inf), ("0", "5", math.inf),
])  # fmt: skip
def test_variables_of_mlflow_count(monkeypatch, switch, interval, seconds):
    monkeypatch.setenv(SWITCH, switch)
    monkeypatch.setenv(INTERVAL, interval)
    assert sampling_interval() == seconds


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "no"), (INTERVAL, "often"), (INTERVAL, "0")])
def test_variables_with_other_values_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is '{value}'; set it to"):
        sampling_interval()


# in a training


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def client(home, monkeypatch) -> MlflowClient:
    enter_project(home, monkeypatch)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(runs, "FLUSH_SHARE", 0.0)
    monkeypatch.setenv(INTERVAL, "1e-9")
    with store() as (client, _):
        return client


def train(params: dict, *, steps: int, resumed: str | None = None) -> str:
    with (
        stage_run("pretrain", params, resumed=resumed) as run,
        Progress("pretrain", epochs=1, steps=steps, history=()) as progress,
    ):
        for _ in range(steps):
            progress.step()
    return run.run_id


def steps_of(client: MlflowClient, run_id: str) -> list[int]:
    name = "system/cpu_utilization_percentage"
    return [point.step for point in client.get_metric_history(run_id, name)]


def test_training_logs_the_load_and_a_resumed_one_goes_on(client):
    threads = {thread for thread in threading.enumerate() if not thread.daemon}
    run_id = train({"test": "load"}, steps=2)
    assert steps_of(client, run_id) == [0, 1]
    after = {thread for thread in threading.enumerate() if not thread.daemon}
    assert after <= threads  # none that could keep a killed stage alive
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}  # MLflow's
    assert client.get_run(run_id).info.status == "FINISHED"
    client.set_terminated(run_id, "KILLED")
    assert train({"test": "load"}, steps=1, resumed=run_id) == run_id
    assert steps_of(client, run_id) == [0, 1, 2]


@pytest.mark.parametrize("reason", ["switched off", "no training", "tracking off"])
def test_load_is_not_logged(client, monkeypatch, reason):
    if reason == "switched off":
        monkeypatch.setenv(SWITCH, "false")
    if reason == "tracking off":
        monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    run_id = train({"test": reason}, steps=0 if reason == "no training" else 3)
    runs.sample()  # after the stage: nothing runs
    if reason == "tracking off":
        assert run_id == ""
    else:
        assert not [n for n in client.get_run(run_id).data.metrics if n.startswith("system/")]


def test_server_that_goes_away_is_said_once_and_stops_no_step(client, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("away")

    with (
        stage_run("pretrain", {"test": "away"}),
        Progress("pretrain", epochs=1, steps=3, history=()) as progress,
    ):
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        for _ in range(3):
            progress.step()
    assert capsys.readouterr().err.count("MLflow can't be reached (away)") == 1
