"""Runs in MLflow: one for each stage that runs, under one parent for each DVC experiment.

Nothing that is logged changes a result, so no stage depends on this folder. Training never fails because
of it: when MLflow is away, that is said once, and `make sync` logs later what the files in metrics/ and
plots/ hold.
"""

import getpass
import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from pipeline import params as parameters
from pipeline.tracking.store import is_off, say_once, store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TAG_KEY = "blockdrop.key"
TAG_ROLE = "blockdrop.role"
TAG_STAGE = "blockdrop.stage"
TAG_PROCESS = "blockdrop.process"
TAG_PARENT = "mlflow.parentRunId"
FLUSH_SECONDS = (
    30.0  # metrics are kept this long at most: a call to the store is a tenth of a short epoch
)
NAMED = 3  # changed parameters in the name of an experiment that DVC gives none
Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step
TEXT_LIMIT = 6000  # characters of a parameter that MLflow takes


class StageRun:
    """One stage's run; every method is safe to call when there is no MLflow."""

    def __init__(self, client: "MlflowClient | None", run_id: str = "", parent_id: str = "") -> None:
        self._client = client
        self._closing_client = client  # after a failure nothing more is logged, but runs are still ended
        self._waiting: list[Point] = []
        self._flushed = time.monotonic()
        self.run_id = run_id
        self.parent_id = parent_id

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Numbers under their names; a None (undefined) is left out. Written within `FLUSH_SECONDS`."""
        if self._client is None:
            return
        now = int(time.time() * 1000)
        self._waiting += [
            (name, value, now, step) for name, value in metrics.items() if value is not None
        ]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def log_artifact(self, path: Path) -> None:
        """A file."""
        self._attempt(lambda client: client.log_artifact(self.run_id, str(path)))

    def finish(self, status: str) -> None:
        """End the run and its parent as FINISHED, FAILED or KILLED.

        A stage that finished takes the place of its earlier runs in the same experiment; those are
        deleted as MLflow deletes, so that they can be restored.
        """
        self._flush()
        if self._closing_client is None:
            return
        try:
            for run_id in (self.run_id, self.parent_id):
                self._closing_client.set_terminated(run_id, status)
            if status == "FINISHED":
                _replace_earlier(self._closing_client, self.run_id, self.parent_id)
        except Exception as error:  # a store, a network, a server: none may stop a training
            if self._client is not None:  # else it was said
                say_once(error)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        if waiting:
            self._attempt(lambda client: client.log_batch(self.run_id, metrics=_made(waiting)))

    def _attempt(self, action: Any) -> None:
        if self._client is None:
            return
        try:
            action(self._client)
        except Exception as error:  # a store, a network, a server: none may stop a training
            self._client = None
            say_once(error)


@contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], *, resumed: str | None = None
) -> Iterator[StageRun]:
    """A run for one stage: FINISHED at the end, KILLED by Ctrl-C or SIGTERM, FAILED by anything else.

    Args:
        params: all parameters, flat.
        resumed: the run that an interrupted training of this stage had, to go on in it.
    """
    run = _open(stage, as_texts(params), resumed)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def experiment_name(params: Mapping[str, str]) -> str:
    """DVC's name of the experiment; under plain `dvc repro`, branch, commit and what differs from it.

    Args:
        params: as `as_texts` gives them.
    """
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    branch = git("rev-parse", "--abbrev-ref", "HEAD") or "no-git"
    place = f"{branch}-{git('rev-parse', '--short', 'HEAD') or 'no-commit'}"
    return " ".join([place, *_changed(params)])


def baseline_commit() -> str:
    """The commit that the experiment was started from."""
    return os.environ.get("DVC_EXP_BASELINE_REV") or git("rev-parse", "HEAD")


def experiment_key(name: str, baseline: str, params: Mapping[str, str]) -> str:
    """What tells experiments apart: names repeat across baselines, and `dvc repro` has none."""
    content = repr((baseline, name, sorted(params.items())))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def as_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow keeps them; equal values give equal texts, whoever read them (2, 2.0)."""
    return {key: _as_text(value)[:TEXT_LIMIT] for key, value in params.items()}


def as_metrics(metrics: Mapping[str, float | None], step: int = 0) -> "list[Metric]":
    """MLflow's form of them, without those that are not defined."""
    now = int(time.time() * 1000)
    return _made([(name, value, now, step) for name, value in metrics.items() if value is not None])


def find_parent(client: "MlflowClient", experiment_id: str, key: str) -> str | None:
    """The id of the parent run with this key."""
    wanted = f"tags.`{TAG_KEY}` = '{key}' and tags.`{TAG_ROLE}` = 'parent'"
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    return str(found[0].info.run_id) if found else None


def make_parent(
    client: "MlflowClient",
    experiment_id: str,
    *,
    name: str,
    baseline: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """The id of the experiment's parent run, made when it isn't there. Call it within `store()`."""
    from mlflow.entities import Param

    key = experiment_key(name, baseline, params)
    found = find_parent(client, experiment_id, key)
    if found is not None:
        return found
    own = {
        TAG_KEY: key,
        TAG_ROLE: "parent",
        "dvc.baseline": baseline,
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": getpass.getuser(),
    }
    own = {tag: text for tag, text in (own | dict(tags)).items() if text}
    run = client.create_run(experiment_id, tags=own, run_name=name)
    client.log_batch(run.info.run_id, params=[Param(*item) for item in params.items()])
    return str(run.info.run_id)


def origin_tags() -> dict[str, str]:
    """Git's and DVC's words on what runs here."""
    commit = git("rev-parse", "HEAD")
    return {
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "git.commit": commit,
        "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        "mlflow.source.git.commit": commit,
    }


def end_orphans(client: "MlflowClient", experiment_id: str) -> list[str]:
    """End, as KILLED, the runs that processes of this machine left RUNNING when they died.

    Returns:
        Their ids.
    """
    ended = []
    for run in client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'"):
        process = run.data.tags.get(TAG_PROCESS, "")
        if process.startswith(f"{platform.node()} ") and not _is_alive(process):
            client.set_terminated(run.info.run_id, "KILLED")
            ended.append(str(run.info.run_id))
    return ended


def git(*words: str) -> str:
    """What Git says; nothing where it can't."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _changed(params: Mapping[str, str]) -> list[str]:
    """What is not as in the commit's params.yaml, in short: key=value, and how many more."""
    try:
        committed = yaml.load(git("show", "HEAD:./params.yaml"), parameters.Loader) or {}
        then = as_texts(dict(parameters.flatten(committed)))
    except (yaml.YAMLError, ValueError, AttributeError):
        return []
    if not then:
        return []
    changed = [f"{key}={text}" for key, text in params.items() if then.get(key) != text]
    more = len(changed) - NAMED
    return changed[:NAMED] + ([f"and {more} more"] if more > 0 else [])


def _made(points: list[Point]) -> "list[Metric]":
    from mlflow.entities import Metric

    return [Metric(*point) for point in points]


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15
        return str(int(value)) if whole else repr(float(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_text, value))}]"
    return str(value)


def _open(stage: str, params: Mapping[str, str], resumed: str | None) -> StageRun:
    if is_off():
        return StageRun(None)
    try:
        with store() as (client, experiment_id):
            parent_id = make_parent(
                client,
                experiment_id,
                name=experiment_name(params),
                baseline=baseline_commit(),
                params=params,
                tags=origin_tags(),
            )
            client.set_tag(parent_id, TAG_PROCESS, _this_process())
            client.update_run(parent_id, status="RUNNING")
        end_orphans(client, experiment_id)
        if resumed and _is_there(client, resumed):
            client.set_tag(resumed, TAG_PARENT, parent_id)  # a repeated experiment has a new name
            client.set_tag(resumed, TAG_PROCESS, _this_process())
            client.update_run(resumed, status="RUNNING")
            return StageRun(client, resumed, parent_id)
        run_id = _make_child(client, experiment_id, parent_id, stage, params)
        return StageRun(client, run_id, parent_id)
    except Exception as error:  # see StageRun._attempt
        say_once(error)
        return StageRun(None)


def _make_child(
    client: "MlflowClient", experiment_id: str, parent_id: str, stage: str, params: Mapping[str, str]
) -> str:
    from mlflow.entities import Param

    tags = {
        TAG_PARENT: parent_id,
        TAG_ROLE: "stage",
        TAG_STAGE: stage,
        TAG_PROCESS: _this_process(),
    }
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=stage).info.run_id)
    client.log_batch(run_id, params=[Param(*item) for item in params.items()])
    return run_id


def _replace_earlier(client: "MlflowClient", run_id: str, parent_id: str) -> None:
    """Delete the stage's earlier runs under the same parent: what they gave was made anew."""
    run = client.get_run(run_id)
    wanted = (
        f"tags.`{TAG_PARENT}` = '{parent_id}' and tags.`{TAG_STAGE}` = '{run.data.tags[TAG_STAGE]}' "
        "and attributes.status != 'RUNNING'"
    )
    for other in client.search_runs([run.info.experiment_id], filter_string=wanted):
        if other.info.run_id != run_id and other.info.start_time <= run.info.start_time:
            client.delete_run(other.info.run_id)


def _this_process() -> str:
    own = psutil.Process()
    return f"{platform.node()} {own.pid} {own.create_time():.1f}"


def _is_alive(process: str) -> bool:
    """Whether the process that `_this_process` described runs still (numbers are given out anew)."""
    try:
        _, number, created = process.rsplit(" ", 2)
        return abs(psutil.Process(int(number)).create_time() - float(created)) < 1
    except (ValueError, psutil.Error):
        return False


def _is_there(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:  # another store than the one that the interrupted training logged to
        return False
