"""Runs in MLflow. The only module that knows it.

One parent run for each DVC experiment, and under it one run for each stage that ran. Nothing that is
logged changes a result, so no stage depends on this module. Training never fails because of it: when
MLflow is away, that is said once and the files in metrics/ and plots/ hold what was to be logged.
`BLOCKDROP_TRACKING=off` logs nothing; MLFLOW_TRACKING_URI names another store.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.resume import project_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "blockdrop"
OFF_VARIABLE = "BLOCKDROP_TRACKING"
TAG_KEY = "blockdrop.key"
TAG_ROLE = "blockdrop.role"
TAG_STAGE = "blockdrop.stage"
TAG_PARENT = "mlflow.parentRunId"
LOCK_PATIENCE = 120  # seconds to wait for another process that sets up the store


class StageRun:
    """One stage's run; every method is safe to call when there is no MLflow."""

    def __init__(self, client: "MlflowClient | None", run_id: str = "", parent_id: str = "") -> None:
        self._client = client
        self._closing_client = client  # after a failure nothing more is logged, but runs are still ended
        self.run_id = run_id
        self.parent_id = parent_id

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Numbers under their names; a None (undefined) is left out."""
        from_names = {name: value for name, value in metrics.items() if value is not None}
        self._attempt(lambda client: _log_metrics(client, self.run_id, from_names, step))

    def log_headline(self, metrics: Mapping[str, float | None]) -> None:
        """Numbers of the whole experiment, on the parent, where experiments are compared."""
        known = {name: value for name, value in metrics.items() if value is not None}
        self._attempt(lambda client: _log_metrics(client, self.parent_id, known, 0))

    def log_artifact(self, path: Path) -> None:
        """A file."""
        self._attempt(lambda client: client.log_artifact(self.run_id, str(path)))

    def log_artifact_to_parent(self, path: Path) -> None:
        """A file that belongs to the whole experiment."""
        self._attempt(lambda client: client.log_artifact(self.parent_id, str(path)))

    def finish(self, status: str) -> None:
        """End the run and its parent as FINISHED, FAILED or KILLED."""
        if self._closing_client is None:
            return
        try:
            for run_id in (self.run_id, self.parent_id):
                self._closing_client.set_terminated(run_id, status)
        except Exception as error:  # a store, a network, a server: none may stop a training
            if self._client is not None:  # else it was said
                _say_once(error)

    def _attempt(self, action: Any) -> None:
        if self._client is None:
            return
        try:
            action(self._client)
        except Exception as error:  # a store, a network, a server: none may stop a training
            self._client = None
            _say_once(error)


@contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], *, resumed: str | None = None
) -> Iterator[StageRun]:
    """A run for one stage: FINISHED at the end, KILLED by Ctrl-C or SIGTERM, FAILED by anything else.

    Args:
        params: all parameters, flat.
        resumed: the run that an interrupted training of this stage had, to go on in it.
    """
    run = _open(stage, params, resumed)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def store_uri() -> str:
    """Where runs are logged: MLFLOW_TRACKING_URI, or mlflow.db in the main checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def experiment_name() -> str:
    """DVC's name of the experiment; under plain `dvc repro`, branch and commit."""
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    branch = _git("rev-parse", "--abbrev-ref", "HEAD") or "no-git"
    return f"{branch}-{_git('rev-parse', '--short', 'HEAD') or 'no-commit'}"


def _experiment_key(params: Mapping[str, Any]) -> str:
    """Names repeat across baselines, and `dvc repro` has none: so baseline, name and parameters."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    content = repr((baseline, experiment_name(), sorted(params.items())))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _say_once(error: Exception) -> None:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(
        f"MLflow can't be reached ({first}); going on without it, metrics are in metrics/ and plots/",
        file=sys.stderr,
    )


def _open(stage: str, params: Mapping[str, Any], resumed: str | None) -> StageRun:
    if os.environ.get(OFF_VARIABLE) == "off":
        return StageRun(None)
    try:
        with _store() as (client, experiment_id):
            parent_id = _parent(client, experiment_id, params)
            client.update_run(parent_id, status="RUNNING")
        _end_orphans(client, experiment_id, parent_id, stage, keep=resumed)
        if resumed and _is_there(client, resumed):
            client.set_tag(resumed, TAG_PARENT, parent_id)  # a repeated experiment has a new name
            client.update_run(resumed, status="RUNNING")
            return StageRun(client, resumed, parent_id)
        tags = {TAG_PARENT: parent_id, TAG_ROLE: "stage", TAG_STAGE: stage}
        run_id = client.create_run(experiment_id, tags=tags, run_name=stage).info.run_id
        _log_params(client, run_id, params)
        return StageRun(client, run_id, parent_id)
    except Exception as error:  # see StageRun._attempt
        _say_once(error)
        return StageRun(None)


@contextmanager
def _store() -> "Iterator[tuple[MlflowClient, str]]":
    """The store and our experiment in it, held alone: processes that open a fresh one at once crash."""
    from filelock import FileLock
    from mlflow import MlflowClient

    folder = project_root() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "mlflow.lock", timeout=LOCK_PATIENCE):
        client = MlflowClient(tracking_uri=store_uri())
        yield client, _experiment(client)


def experiment_id() -> str:
    """The MLflow experiment that runs are logged to; made when it isn't there."""
    with _store() as (_, found):
        return found


def _is_there(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:  # another store than the one that the interrupted training logged to
        return False


def _end_orphans(
    client: "MlflowClient", experiment_id: str, parent_id: str, stage: str, *, keep: str | None
) -> None:
    """A stage that was killed with SIGKILL left its run RUNNING: end it as KILLED."""
    wanted = (
        f"tags.`{TAG_PARENT}` = '{parent_id}' and tags.`{TAG_STAGE}` = '{stage}' "
        "and attributes.status = 'RUNNING'"
    )
    for run in client.search_runs([experiment_id], filter_string=wanted):
        if run.info.run_id != keep:
            client.set_terminated(run.info.run_id, "KILLED")


def _experiment(client: "MlflowClient") -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    remote = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
    location = None if remote else (project_root() / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _parent(client: "MlflowClient", experiment_id: str, params: Mapping[str, Any]) -> str:
    key = _experiment_key(params)
    wanted = f"tags.`{TAG_KEY}` = '{key}' and tags.`{TAG_ROLE}` = 'parent'"
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {
        TAG_KEY: key,
        TAG_ROLE: "parent",
        "git.commit": _git("rev-parse", "HEAD"),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    }
    run = client.create_run(experiment_id, tags=tags, run_name=experiment_name())
    _log_params(client, run.info.run_id, params)
    return str(run.info.run_id)


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])


def _log_metrics(client: "MlflowClient", run_id: str, metrics: Mapping[str, float], step: int) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
