"""Runs in MLflow: one for each stage that runs, under one parent for each DVC experiment.

Nothing that is logged changes a result, so no stage depends on this folder. Training never fails because
of it, unless the user wants that (reach.py): when MLflow is away, that is said once, what could not be
logged waits and is tried again, and `make sync` logs later what the files in metrics/ and plots/ hold.
"""

import getpass
import hashlib
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from pipeline import config as parameters
from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.infra.safe_io import printable
from pipeline.tracking.connection import (
    OFF,
    SQLITE,
    STRICT,
    Bounded,
    TrackingError,
    http_timeout,
    mode,
    reason,
    require_usable,
    silence_mlflow,
)
from pipeline.tracking.store import say_once, shown_uri, store, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

TAG_KEY = "blockdrop.key"
TAG_ROLE = "blockdrop.role"
TAG_STAGE = "blockdrop.stage"
TAG_PROCESS = "blockdrop.process"
TAG_PARENT = "mlflow.parentRunId"
# seconds that metrics are kept: a call to the store is a tenth of a short epoch. After a failure they
# double with each further one, up to LONGEST_WAIT
FLUSH_SECONDS = 30.0
LONGEST_WAIT = 600.0
CALM = 20  # the next attempt waits this many times as long as the last one took: 5 % of a training
PATIENCE = 10.0  # seconds for a call, and after which an attempt begins no further one
OPEN_SECONDS = (
    15.0  # instead for the first attempt: ten calls, and to check a password takes half a second
)
SHORT_PATIENCE = 5.0  # where the last attempt failed, or the stage
LAST_PATIENCE = 2.0  # after Ctrl-C
END_SECONDS = 30.0  # for what still waits when a stage is done; `make sync` logs the rest
QUICK = 1.0  # a store that fails within a second is asked to end the run all the same
BATCH = 1000  # metrics that MLflow takes in one call
NAMED = 3  # changed parameters in the name of an experiment that DVC gives none
Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step
TEXT_LIMIT = 6000  # characters of a parameter that MLflow takes


class StageRun:
    """One stage's run; every method is safe to call when there is no MLflow.

    What is to be logged waits here until it is logged, with its own time and step. A point that is sent
    again, because the answer was lost, is still one point: name, time, step and value are its key in
    MLflow's SQL store, which passes over those that it has.

    Args:
        stage: its name.
        params: all parameters, as `as_texts` gives them.
        resumed: the run to go on in, where it is still there; epochs that it has are passed over.

    Attributes:
        run_id: empty until MLflow was reached.
        parent_id: likewise.
    """

    def __init__(self, stage: str, params: Mapping[str, str], resumed: str | None = None) -> None:
        self.run_id = ""
        self.parent_id = ""
        self._mode = mode()
        self._stage = stage
        self._resumed = resumed
        self._client: Any = None
        self._experiment_id = ""
        self._all_params = params
        self._params = dict(params)  # these four are what waits
        self._points: list[Point] = []
        self._tags: dict[str, str] = {}
        self._files: list[Path] = []
        self._began = int(time.time() * 1000)
        self._failures = 0  # since MLflow answered last
        self._tried = time.monotonic()
        self._took = 0.0  # seconds, the last attempt
        if self._mode != OFF:  # as it is now: a training may log for the first time when it is over
            self._name, self._baseline = experiment_name(params), baseline_commit()
            self._origin = origin_tags()

    def open(self) -> None:
        """Make the run in MLflow, or go on in the resumed one; later, where MLflow is away now.

        Raises:
            TrackingError: MLflow is away and BLOCKDROP_TRACKING is strict. So do all other methods.
        """
        if self._mode != OFF and self._flush(PATIENCE, until=time.monotonic() + OPEN_SECONDS):
            self._took = 0.0  # paid once

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Numbers under their names; a None (undefined) is left out. Written within `FLUSH_SECONDS`."""
        if self._mode == OFF:
            return
        now = int(time.time() * 1000)
        self._points += [
            (name, value, now, step) for name, value in metrics.items() if value is not None
        ]
        self._flush_when_due()

    def set_tag(self, name: str, value: str) -> None:
        """A remark on the run, which the UI shows."""
        if self._mode == OFF:
            return
        self._tags[name] = value[:TEXT_LIMIT]
        self._flush_when_due()

    def log_artifact(self, path: Path) -> None:
        """A file; it is read at the end of the stage at the latest."""
        if self._mode == OFF:
            return
        if path.exists():
            self._files.append(path)
            self._flush_when_due()
        else:
            print(f"{printable(path)} is not there, so it is not logged", file=sys.stderr)

    def attempt(self, action: Callable[[], None], *, seconds: float = 30.0) -> None:
        """Do something else with the store, as safely; nothing, while MLflow is away.

        Args:
            seconds: for each call.
        """
        if self._mode != OFF and not self._failures:
            self._attempt(action, seconds)

    def finish(self, status: str) -> None:
        """End the run and its parent as FINISHED, FAILED or KILLED.

        A stage that finished takes the place of its earlier runs in the same experiment; those are
        deleted as MLflow deletes, so that they can be restored.
        """
        if self._mode == OFF:
            return
        if status != "FINISHED" and self._mode == STRICT:
            self._mode = ""  # an error is under way: no other one in its place
        seconds, until = self._last_limits(status)
        if self.run_id or status != "KILLED":  # no run is begun after Ctrl-C
            self._flush(seconds, until=until, always=status == "KILLED")
        if self._points and not self._failures:
            print(f"MLflow is slow: {len(self._points)} points are left to `make sync`", file=sys.stderr)
        if self.run_id and (not self._failures or self._took < QUICK):
            client = Bounded(self._client, until)
            self._attempt(lambda: self._end(client, status), seconds, always=status == "KILLED")

    def _last_limits(self, status: str) -> tuple[float, float]:
        """Seconds for a call, and when the last one may begin."""
        now = time.monotonic()
        if status == "KILLED":
            return LAST_PATIENCE, now + LAST_PATIENCE
        if status == "FAILED":
            return SHORT_PATIENCE, now + SHORT_PATIENCE
        until = math.inf if self._mode == STRICT else now + END_SECONDS
        return SHORT_PATIENCE if self._failures else PATIENCE, until

    def _flush_when_due(self) -> None:
        wait = min(FLUSH_SECONDS * 2 ** min(max(self._failures - 1, 0), 10), LONGEST_WAIT)
        if time.monotonic() - self._tried > max(wait, CALM * self._took):
            self._flush(SHORT_PATIENCE if self._failures else PATIENCE)

    def _flush(self, seconds: float, *, until: float = 0.0, always: bool = False) -> bool:
        """Log what waits, as far as the time goes; whether MLflow was there."""
        failed_before = self._failures > 0
        until = until or time.monotonic() + seconds
        if not self._attempt(lambda: self._log_waiting(until), seconds, always=always):
            return False
        self._failures = 0
        if failed_before:
            rest = f"{len(self._points)} points still wait" if self._points else "what waited is logged"
            print(f"MLflow is back; {rest}", file=sys.stderr)
        return True

    def _attempt(self, action: Callable[[], None], seconds: float, *, always: bool = False) -> bool:
        began, outer = time.monotonic(), sys.exception()
        try:
            with http_timeout(seconds, always=always), silence_mlflow():
                if self._client is not None:  # else store() does it, when other processes are done
                    require_usable(store_uri(), seconds=seconds)
                action()
        except Exception as error:  # a store, a network, a server: none may stop a training
            self._failed(error, outer)
            return False
        finally:
            self._tried = time.monotonic()
            self._took = self._tried - began
        return True

    def _failed(self, error: Exception, outer: BaseException | None) -> None:
        self._failures += 1
        if self._mode == STRICT:
            if isinstance(error, UserError):  # with a remedy of its own
                raise TrackingError(f"{error}; or unset BLOCKDROP_TRACKING, which is strict") from None
            remedy = "free or mend the file" if shown_uri().startswith(SQLITE) else "start the server"
            raise TrackingError(
                f"MLflow at {shown_uri()} can't be reached ({reason(error, outer)}) and "
                f"BLOCKDROP_TRACKING is strict; {remedy}, or unset BLOCKDROP_TRACKING to go on "
                "without it"
            ) from None
        if self._failures == 1:
            say_once(error, outer)

    def _log_waiting(self, until: float) -> None:
        """Each thing is forgotten when it is logged, so that what a failure leaves is tried again."""
        client = self._join(until)
        if self._params:
            client.log_batch(self.run_id, params=_made_params(self._params))
            self._params = {}
        if self._points and self._resumed == self.run_id:
            self._pass_over_known(client)
        while self._points and client.has_time():
            client.log_batch(self.run_id, metrics=_made(self._points[:BATCH]))
            del self._points[:BATCH]
        while self._tags and client.has_time():
            name = next(iter(self._tags))
            client.set_tag(self.run_id, name, self._tags[name])
            del self._tags[name]
        while self._files and client.has_time():
            if self._files[0].exists():
                client.log_artifact(self.run_id, str(self._files[0]))
            del self._files[0]

    def _join(self, until: float) -> Bounded:
        """A client for this attempt; what earlier ones have not made yet of parent and run is made."""
        if self._client is None:
            lock_patience = LAST_PATIENCE if self._failures else None
            asked = time.monotonic()
            with store(patience=lock_patience) as (client, self._experiment_id):
                if store_uri().startswith(SQLITE):  # others set up a fresh one, or we do: seconds
                    until += time.monotonic() - asked
                bounded: Any = Bounded(client, until)
                self.parent_id = make_parent(
                    bounded,
                    self._experiment_id,
                    name=self._name,
                    baseline=self._baseline,
                    params=self._all_params,
                    tags=self._origin,
                )
                bounded.set_tag(self.parent_id, TAG_PROCESS, _this_process())
                bounded.update_run(self.parent_id, status="RUNNING")
            self._client = client
        bounded = Bounded(self._client, until)
        if not self.run_id:
            self.run_id = self._resume(bounded) or self._begin(bounded)
            if bounded.has_time():
                end_orphans(bounded, self._experiment_id)
        return bounded

    def _resume(self, client: Any) -> str:
        """The id of the run that is resumed, if it is there."""
        run = _active_run(client, self._resumed) if self._resumed else None
        if run is None:
            return ""
        client.set_tag(self._resumed, TAG_PARENT, self.parent_id)  # a repeated experiment has a new name
        client.set_tag(self._resumed, TAG_PROCESS, _this_process())
        client.update_run(self._resumed, status="RUNNING")
        known = run.data.params  # MLflow refuses to change one
        self._params = {name: text for name, text in self._params.items() if name not in known}
        return str(self._resumed)

    def _pass_over_known(self, client: Any) -> None:
        """Drop the points of epochs that the resumed run has already; a training hands in all again.

        Points are logged in their order, so the last metric of an epoch stands for all of it.
        """
        name = next((name for name, _, _, step in reversed(self._points) if step > 0), None)
        if name is not None:
            history = client.get_metric_history(self.run_id, name)
            known = max((point.step for point in history), default=0)
            self._points = [point for point in self._points if not 0 < point[3] <= known]
            self._resumed = None

    def _begin(self, client: Any) -> str:
        """The id of a new run, or of the one that an attempt began whose answer was lost."""
        tags = {
            TAG_PARENT: self.parent_id,
            TAG_ROLE: "stage",
            TAG_STAGE: self._stage,
            TAG_PROCESS: _this_process(),
        }
        wanted = f"tags.`{TAG_PARENT}` = '{self.parent_id}' and tags.`{TAG_STAGE}` = '{self._stage}'"
        found = client.search_runs([self._experiment_id], wanted) if self._failures else []
        begun = [
            run.info.run_id
            for run in found
            if run.info.start_time == self._began and tags.items() <= run.data.tags.items()
        ]
        if begun:
            return str(begun[0])
        made = client.create_run(
            self._experiment_id, start_time=self._began, tags=tags, run_name=self._stage
        )
        return str(made.info.run_id)

    def _end(self, client: Any, status: str) -> None:
        for run_id in (self.run_id, self.parent_id):
            client.set_terminated(run_id, status)
        if status == "FINISHED":
            _replace_earlier(client, self.run_id, self.parent_id)


@contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], *, resumed: str | None = None
) -> Iterator[StageRun]:
    """A run for one stage: FINISHED at the end, KILLED by Ctrl-C or SIGTERM, FAILED by anything else.

    Args:
        params: all parameters, flat.
        resumed: the run that an interrupted training of this stage had, to go on in it.

    Raises:
        TrackingError: MLflow is away and BLOCKDROP_TRACKING is strict.
        UserError: BLOCKDROP_TRACKING says what it can't.
    """
    run = StageRun(stage, as_texts(params), resumed)
    try:
        run.open()
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
    found = _parent_of(client, experiment_id, key)
    return None if found is None else str(found.info.run_id)


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
    key = experiment_key(name, baseline, params)
    found = _parent_of(client, experiment_id, key)
    if found is not None:
        _log_params(client, found, params)
        return str(found.info.run_id)
    own = {
        TAG_KEY: key,
        TAG_ROLE: "parent",
        "dvc.baseline": baseline,
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    own = {tag: text for tag, text in (own | dict(tags)).items() if text}
    run = client.create_run(experiment_id, tags=own, run_name=name)
    _log_params(client, run, params)
    return str(run.info.run_id)


def _user() -> str:
    """The user's name; the number where it has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


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
    """What Git says; nothing where it can't.

    Also where the project is another user's folder (a container's mount): its code runs anyway. A
    repository around the project stays refused, since Git would run the commands that its settings name.
    """
    try:
        command = ["git", "-c", f"safe.directory={project_root().resolve()}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
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


def _made_params(params: Mapping[str, str]) -> "list[Param]":
    from mlflow.entities import Param

    return [Param(*item) for item in params.items()]


def _log_params(client: "MlflowClient", run: "Run", params: Mapping[str, str]) -> None:
    """Those that the run lacks: all of a new one's, and what a store that went away did not take."""
    lacking = {name: text for name, text in params.items() if name not in run.data.params}
    client.log_batch(run.info.run_id, params=_made_params(lacking))


def _parent_of(client: "MlflowClient", experiment_id: str, key: str) -> "Run | None":
    wanted = f"tags.`{TAG_KEY}` = '{key}' and tags.`{TAG_ROLE}` = 'parent'"
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    return found[0] if found else None


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15
        return str(int(value)) if whole else repr(float(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_text, value))}]"
    return str(value)


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


def _active_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, unless it was deleted or is another store's, which the interrupted training logged to."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise  # the store is away: it may be there
        return None
    return run if run.info.lifecycle_stage == "active" else None
