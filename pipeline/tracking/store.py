"""The MLflow store: where it is, one process at a time while it is set up, and links into its UI.

`BLOCKDROP_TRACKING=off` logs nothing, `strict` lets no stage go on without it; MLFLOW_TRACKING_URI names
another store; otherwise it is mlflow.db in the main checkout, also for what runs in a temporary one.
When a project is copied or moved, its mlflow.db then names the artifacts in the new folder.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

from pipeline.infra.errors import UserError
from pipeline.infra.resume import PROJECT_MARK, project_root
from pipeline.tracking.connection import OFF, masked, mode, reason, require_store, require_usable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "blockdrop"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
PLACES = (  # columns of MLflow's tables with absolute places of files
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
LOCK_PATIENCE = 60.0  # seconds to wait for another process that sets up the store
HOST = "127.0.0.1"  # of the UI that `make ui` starts
PORT = 5000


def is_off() -> bool:
    """Whether the user wants nothing logged.

    Raises:
        UserError: BLOCKDROP_TRACKING says what it can't.
    """
    return mode() == OFF


def store_uri() -> str:
    """Where runs are logged: MLFLOW_TRACKING_URI, or mlflow.db in the main checkout.

    SQLite's relative paths are relative to the main checkout as well: a temporary one is deleted.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, rest = os.environ.get("MLFLOW_TRACKING_URI", "").strip().partition("://")
    told = scheme.lower() + mark + rest if mark else scheme
    if told and not told.startswith("sqlite"):
        return told
    try:
        url = make_url(told) if told else URL.create("sqlite", database=DATABASE)
    except ArgumentError:  # MLflow says what is wrong with it
        return str(told)
    if not url.database or url.database.startswith((":memory:", "file:", "/")):
        return str(told)
    path = str(project_root() / url.database)
    return url.set(database=path).render_as_string(hide_password=False)


def shown_uri() -> str:
    """The same, to be printed: without passwords."""
    return masked(store_uri())


@contextmanager
def store(*, patience: float | None = None) -> "Iterator[tuple[MlflowClient, str]]":
    """A client and our experiment's id, held alone: processes that open a fresh store at once crash.

    Args:
        patience: seconds to wait for another process; None: LOCK_PATIENCE.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    folder = project_root() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    timeout = LOCK_PATIENCE if patience is None else patience
    with FileLock(folder / "mlflow.lock", timeout=timeout, mode=0o666):  # as in locks.py: for all users
        require_store(store_uri())
        require_usable(store_uri(), seconds=patience)
        _require_place_without_percent()
        client = MlflowClient(tracking_uri=store_uri())
        yield client, _experiment(client)


def experiment_id() -> str:
    """The MLflow experiment that runs are logged to; made when it isn't there."""
    with store() as (_, found):
        return found


def say_once(error: Exception, outer: BaseException | None = None) -> None:
    """One line on a store that can't be used; `outer` as in `reason`."""
    what = "be used" if isinstance(error, UserError) else "be reached"
    print(
        f"MLflow can't {what} ({reason(error, outer)}); going on without it, metrics are in "
        "metrics/ and plots/; `make sync` logs later what it misses",
        file=sys.stderr,
    )


def ui_address() -> str:
    """The server that MLFLOW_TRACKING_URI names, or the one that `make ui` starts."""
    uri = store_uri()
    if not uri.startswith("http"):
        return f"http://{HOST}:{PORT}"
    parts = urlsplit(uri)  # a link has no user and password in it
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def runs_page(experiment: str) -> str:
    """The part of a link that opens the table of runs.

    MLflow 3.17 opens experiments in its GenAI view, where training runs are out of sight, unless the
    link says otherwise.
    """
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning"


def run_page(experiment: str, run_id: str) -> str:
    """The part of a link that opens one run."""
    return f"#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def compare_page(experiment: str, run_ids: Sequence[str]) -> str:
    """The part of a link that compares runs."""
    runs, experiments = (quote(json.dumps(list(ids))) for ids in (run_ids, [experiment]))
    return f"#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"


def _experiment(client: "MlflowClient") -> str:
    name, number = (os.environ.get(f"MLFLOW_EXPERIMENT_{what}") for what in ("NAME", "ID"))
    by_number = client.get_experiment(number) if number and not name else None
    name = name or EXPERIMENT
    found = by_number or client.get_experiment_by_name(name)
    if found is not None:
        _require_active(found)
        _bring_along(str(found.artifact_location))
        return str(found.experiment_id)
    location = None if store_uri().startswith("http") else (project_root() / ARTIFACTS).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _require_active(experiment: "Experiment") -> None:
    """See that runs can be logged to it.

    Raises:
        UserError: it was deleted.
    """
    if experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise UserError(
            f"the experiment {experiment.name!r} was deleted in MLflow; "
            f"`MLFLOW_TRACKING_URI={shown_uri()} mlflow experiments restore --experiment-id {number}` "
            "brings it back, and MLFLOW_EXPERIMENT_NAME names another one"
        )


def _require_place_without_percent() -> None:
    """See that MLflow can set up a database: the library that it does this by takes no % in a path.

    Raises:
        UserError: it can't, from the folder where MLflow is installed.
    """
    import mlflow

    folder = Path(mlflow.__file__).parent
    if "%" in str(folder) and not store_uri().startswith("http"):
        raise UserError(
            f"MLflow opens no database from {folder}, as there is a % in it; give the folder another "
            "name (`make setup` makes its .venv anew)"
        )


def _bring_along(location: str) -> None:
    """Let the store of a project that was copied or moved name this folder's files, not the old one's.

    Args:
        location: of the experiment's artifacts, as the store has it.
    """
    root = project_root()
    old = _former_root(location, root)
    if old is None or not _is_own(store_uri(), root):
        return
    with closing(sqlite3.connect(root / DATABASE)) as database, database:  # all or nothing
        for before, after in ((old.as_uri(), root.as_uri()), (str(old), str(root))):
            for table, column in PLACES:
                database.execute(
                    f"UPDATE {table} SET {column} = :after || substr({column}, length(:before) + 1) "
                    f"WHERE substr({column}, 1, length(:before) + 1) = :before || '/'",
                    {"before": before, "after": after},
                )
    print(
        f"{DATABASE} comes from {old}; the files of its runs are now those in {root / ARTIFACTS} "
        f"(copy what is missing there from {old / ARTIFACTS})",
        file=sys.stderr,
    )


def _former_root(location: str, root: Path) -> Path | None:
    """The project folder whose artifacts a store names, if it is another one; None: they stay there."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if not location.startswith("file:"):
        return None
    folder = Path(local_file_uri_to_path(location))
    old = folder.parent
    if folder.name != ARTIFACTS or old == root:
        return None
    try:
        stays = (
            old.samefile(root) or not (old / PROJECT_MARK).is_dir()
        )  # no project: they are wanted there
    except OSError:  # it is gone, or another user's
        stays = False
    return None if stays else old


def _is_own(uri: str, root: Path) -> bool:
    """Whether it is the store of this very folder, and no link to that of another."""
    from sqlalchemy.engine import make_url

    path = root / DATABASE
    return uri.startswith("sqlite") and make_url(uri).database == str(path) and not path.is_symlink()
