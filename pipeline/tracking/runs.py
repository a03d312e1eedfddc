"""Runs in MLflow: one for each stage that runs, under one parent run for each DVC experiment.

Logging is best effort. At the first call that fails a stage prints one line and logs nothing more; the
next stage tries again, and `make sync` completes what is missing from metrics/ and plots/. No result
depends on this package, so no stage has it as a dependency.
"""

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import printable
from pipeline.tracking import processes
from pipeline.tracking.connection import (
    OFF,
    SQLITE,
    STRICT,
    TrackingError,
    http_timeout,
    mode,
    reason,
    require_usable,
    silence_mlflow,
)
from pipeline.tracking.identity import (
    TEXT_LIMIT,
    as_texts,
    baseline_commit,
    experiment_key,
    experiment_name,
    local_preset,
    origin_tags,
    run_name,
)
from pipeline.tracking.store import shown_uri, store, store_uri
from pipeline.tracking.system_metrics import PREFIX, SystemMetrics, sampling_interval
from pipeline.tracking.units import readable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

TAG_ROLE = "blockdrop.role"
TAG_STAGE = "blockdrop.stage"
TAG_PRESET = "preset"
TAG_PARENT = "mlflow.parentRunId"
# MLflow's UI hides tags under mlflow.: these are for the code alone
HIDDEN = "mlflow."
TAG_KEY = f"{HIDDEN}blockdrop.key"
TAG_PROCESS = f"{HIDDEN}blockdrop.process"
LAST_STAGE = "report"
# metrics of short epochs are written together: a call takes a tenth of one
FLUSH_SECONDS = 30.0
FLUSH_SHARE = 20  # the next call waits this many times as long as the last one took: 5 % of a training
TIMEOUT = 10.0  # seconds for a call
KILLED_TIMEOUT = 2.0  # seconds for a call after Ctrl-C
BATCH = 1000  # metrics that MLflow takes in one call


_current: "StageRun | None" = None


class StageRun:
    """One stage's run, with parameters from `as_texts`; any method may be called without MLflow too."""

    def __init__(self, stage: str, params: Mapping[str, str]) -> None:
        self.run_id = self.parent_id = ""  # as long as MLflow was not reached
        self._stage = stage
        self._params = params
        self._mode = mode()
        self._logging = self._mode != OFF
        self._killed = False
        self._client: Any = None
        self._driver: processes.Driver | None = None
        self._interval = sampling_interval()
        self._system: SystemMetrics | None = None  # of trainings, from their first step on
        self._metrics: list[Metric] = []  # of the next call
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._last_steps: dict[str, int] = {}  # of the resumed run's metrics

    def open(self, resumed: str | None = None) -> None:
        """Create the run, or continue a resumed one where it still exists.

        Raises:
            TrackingError: MLflow is away and BLOCKDROP_TRACKING is strict. So do all other methods.
        """
        self.attempt(lambda: self._open(resumed))

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Log metrics, undefined ones (None) left out, within `FLUSH_SECONDS`.

        A resumed training logs all its epochs again; those that its run has are skipped.
        """
        if not self._logging:
            return
        self._metrics += as_metrics(
            {k: v for k, v in metrics.items() if step == 0 or step > self._last_steps.get(k, 0)}, step
        )
        self._flush_if_due()

    def sample(self) -> None:
        """Log the machine's load, if it is time for a sample."""
        if not self._logging:
            return
        if self._system is None:
            steps = [step for name, step in self._last_steps.items() if name.startswith(PREFIX)]
            self._system = SystemMetrics(self._interval, 1 + max(steps, default=-1))
        self._metrics += self._system.sample()
        self._flush_if_due()

    def set_tag(self, name: str, value: str) -> None:
        self.attempt(lambda: self._client.set_tag(self.run_id, name, value[:TEXT_LIMIT]))

    def log_artifact(self, path: Path) -> None:
        if self._logging and not path.exists():
            print(f"{printable(path)} is not there, so it is not logged", file=sys.stderr)
        else:
            self.attempt(lambda: self._client.log_artifact(self.run_id, str(path)))

    def attempt(self, action: Callable[[], None], *, seconds: float | None = None) -> bool:
        """Call the store; whether it answered. Nothing is called after the first failure.

        Args:
            seconds: for each call; None: TIMEOUT.
        """
        if not self._logging:
            return False
        handled = sys.exception()
        seconds = KILLED_TIMEOUT if self._killed else seconds or TIMEOUT
        try:
            with http_timeout(seconds, override=self._killed), silence_mlflow():
                if self.run_id:  # before, store() does it, once other processes have set up the store
                    require_usable(store_uri(), seconds=seconds)
                action()
        except Exception as error:  # of store, network or server: none may stop a training
            self._switch_off(error, handled)
            return False
        return True

    def finish(self, status: str) -> None:
        """End the run and its parent as FINISHED, FAILED or KILLED.

        A stage that finished replaces its earlier runs in the same experiment; those are deleted as
        MLflow deletes, so that they can be restored.
        """
        self._killed = status == "KILLED"
        if status != "FINISHED":
            self._mode = ""  # an exception is on its way, and no other one may replace it
        if self.run_id:
            self._flush()
            self.attempt(lambda: self._end(status))

    def _switch_off(self, error: Exception, handled: BaseException | None) -> None:
        self._logging = False
        self._metrics = []
        if self._mode != STRICT:
            verb = "be used" if isinstance(error, UserError) else "be reached"
            print(
                f"MLflow can't {verb} ({reason(error, handled)}); going on without it, metrics are in "
                "metrics/ and plots/; `make sync` logs later what it misses",
                file=sys.stderr,
            )
        elif isinstance(error, UserError):  # with a remedy of its own
            raise TrackingError(f"{error}; or unset BLOCKDROP_TRACKING, which is strict") from None
        else:
            remedy = "free or repair the file" if shown_uri().startswith(SQLITE) else "start the server"
            raise TrackingError(
                f"MLflow at {shown_uri()} can't be reached ({reason(error, handled)}) and "
                f"BLOCKDROP_TRACKING is strict; {remedy}, or unset BLOCKDROP_TRACKING to go on "
                "without it"
            ) from None

    def _open(self, resumed: str | None) -> None:
        self._driver = processes.driver()
        with store() as (client, experiment_id):
            self.parent_id = make_parent(
                client,
                experiment_id,
                name=experiment_name(self._params),
                baseline=baseline_commit(),
                params=self._params,
                tags=origin_tags() | {TAG_PRESET: local_preset(self._params)},
            )
            process = processes.this_process()
            owner = self._driver.process if self._driver else process
            client.set_tag(self.parent_id, TAG_PROCESS, owner)
            client.update_run(self.parent_id, status="RUNNING")
        self._client = client
        tags = {TAG_PARENT: self.parent_id, TAG_PROCESS: process}
        run = find_run(client, resumed) if resumed else None
        if run is None or run.info.lifecycle_stage != "active":
            tags |= {TAG_ROLE: "stage", TAG_STAGE: self._stage}
            run = client.create_run(experiment_id, tags=tags, run_name=self._stage)
        else:
            for name, value in tags.items():  # a repeated DVC experiment has a new name, so a new parent
                client.set_tag(run.info.run_id, name, value)
            client.update_run(run.info.run_id, status="RUNNING")
            self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self.run_id = str(run.info.run_id)
        _log_missing_params(client, run, self._params)
        end_orphans(client, experiment_id)

    def _flush_if_due(self) -> None:
        if self._metrics and time.monotonic() > self._next_flush:
            self._flush()

    def _flush(self) -> None:
        began = time.monotonic()
        while self._metrics and self.attempt(
            lambda: self._client.log_batch(self.run_id, metrics=self._metrics[:BATCH])
        ):
            del self._metrics[:BATCH]
        ended = time.monotonic()
        self._next_flush = ended + max(FLUSH_SECONDS, FLUSH_SHARE * (ended - began))

    def _end(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)
        if status != "FINISHED" or not self._goes_on():
            self._client.set_terminated(self.parent_id, status)
        if status == "FINISHED":
            self._delete_earlier()

    def _goes_on(self) -> bool:
        """Whether DVC may run another stage of the experiment after this one."""
        return (
            self._stage != LAST_STAGE
            and self._driver is not None
            and self._stage.partition("-")[0] not in self._driver.targets
            and processes.is_alive(self._driver.process)
        )

    def _delete_earlier(self) -> None:
        """Delete the stage's earlier runs under the same parent, whose results this one has replaced."""
        info = self._client.get_run(self.run_id).info
        earlier = (
            f"tags.`{TAG_PARENT}` = '{self.parent_id}' and tags.`{TAG_STAGE}` = '{self._stage}' "
            f"and attributes.status != 'RUNNING' and attributes.start_time <= {info.start_time}"
        )
        for run in self._client.search_runs([info.experiment_id], filter_string=earlier):
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)


@contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], *, resumed: str | None = None
) -> Iterator[StageRun]:
    """A run for one stage: FINISHED at the end, KILLED by Ctrl-C or SIGTERM, FAILED by anything else.

    Where an interrupted training had one, of the id `resumed`, that is continued.

    Raises:
        TrackingError: MLflow is away and BLOCKDROP_TRACKING is strict.
        UserError: BLOCKDROP_TRACKING has a value that it can't have.
    """
    global _current
    run, outer = StageRun(stage, as_texts(params)), _current
    try:
        run.open(resumed)
        _current = run
        yield run
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    else:
        run.finish("FINISHED")
    finally:
        _current = outer


def sample() -> None:
    """Let the stage that runs log the machine's load; a training calls this at each step."""
    if _current is not None:
        _current.sample()


def as_metrics(metrics: Mapping[str, float | None], step: int = 0) -> "list[Metric]":
    """MLflow's form of metrics, in readable units, undefined ones left out."""
    from mlflow.entities import Metric

    now, shown = int(time.time() * 1000), readable(metrics)
    return [Metric(name, value, now, step) for name, value in shown.items() if value is not None]


def find_parent(client: "MlflowClient", experiment_id: str, key: str) -> "Run | None":
    for tag in (TAG_KEY, TAG_KEY.removeprefix(HIDDEN)):  # the second is an older version's
        run = first_run(
            client, experiment_id, f"tags.`{tag}` = '{key}' and tags.`{TAG_ROLE}` = 'parent'"
        )
        if run is not None:
            return run
    return None


def first_run(client: "MlflowClient", experiment_id: str, condition: str) -> "Run | None":
    runs = client.search_runs([experiment_id], filter_string=condition, max_results=1)
    return runs[0] if runs else None


def make_parent(
    client: "MlflowClient",
    experiment_id: str,
    *,
    name: str,
    baseline: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """The id of the experiment's parent run, made when there is none. Call it within `store()`."""
    key = experiment_key(name, baseline, params)
    run = find_parent(client, experiment_id, key)
    if run is None:
        all_tags = {
            TAG_KEY: key,
            TAG_ROLE: "parent",
            "dvc.baseline": baseline,
            "mlflow.source.name": "dvc.yaml",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
            **tags,
        }
        all_tags = {tag: text for tag, text in all_tags.items() if text}
        run = client.create_run(experiment_id, tags=all_tags, run_name=run_name(name))
    _log_missing_params(client, run, params)
    return str(run.info.run_id)


def _log_missing_params(client: "MlflowClient", run: "Run", params: Mapping[str, str]) -> None:
    """Log those that the run lacks: MLflow changes none, and a failed call may have lost some."""
    from mlflow.entities import Param

    missing = [Param(name, text) for name, text in params.items() if name not in run.data.params]
    client.log_batch(run.info.run_id, params=missing)


def _user() -> str:
    """The user's name, or the user ID where it has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def end_orphans(client: "MlflowClient", experiment_id: str) -> list[str]:
    """End, as KILLED, the runs that processes of this machine left RUNNING when they died.

    A parent whose stage lives goes on, even where DVC has died.
    """
    running = client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'")
    left = [str(run.info.run_id) for run in running if _is_left(run)]
    alive = {run.data.tags.get(TAG_PARENT) for run in running if run.info.run_id not in left}
    ended = [run_id for run_id in left if run_id not in alive]
    for run_id in ended:
        client.set_terminated(run_id, "KILLED")
    return ended


def _is_left(run: "Run") -> bool:
    process = run.data.tags.get(TAG_PROCESS, "")
    return processes.is_here(process) and not processes.is_alive(process)


def find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run of that id; None where the store has none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise  # the store is away, and may have the run
        return None
