"""The MLflow store: its address, a lock while it is set up, and links into its UI.

MLFLOW_TRACKING_URI names it; otherwise it is mlflow.db in the main checkout, also for stages that run in
a temporary one. When a project was copied or moved, the paths in its mlflow.db are updated.
"""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from pipeline.infra.errors import UserError
from pipeline.infra.resume import PROJECT_MARK, project_root
from pipeline.tracking import view
from pipeline.tracking.connection import masked, require_store, require_usable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "blockdrop"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
PATH_COLUMNS = (  # of MLflow's tables, with absolute paths of files
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
LOCK_TIMEOUT = 60.0  # seconds to wait for another process that sets up the store
# for servers started here: else MLflow 3.17 starts ten processes for GenAI jobs, which nobody submits
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
HOST = "127.0.0.1"  # of the UI that `make ui` starts
PORT = 5050  # not 5000, which `mlflow models serve` takes by itself


def store_uri() -> str:
    """Where runs are logged: MLFLOW_TRACKING_URI, or mlflow.db in the main checkout.

    SQLite's relative paths are relative to the main checkout as well: a temporary one is deleted.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, rest = os.environ.get("MLFLOW_TRACKING_URI", "").strip().partition("://")
    uri = scheme.lower() + mark + rest if mark else scheme
    if uri and not uri.startswith("sqlite"):
        return uri
    try:
        url = make_url(uri) if uri else URL.create("sqlite", database=DATABASE)
    except ArgumentError:  # MLflow says what is wrong with it
        return str(uri)
    if not url.database or url.database.startswith((":memory:", "file:", "/")):
        return str(uri)
    path = str(project_root() / url.database)
    return url.set(database=path).render_as_string(hide_password=False)


def shown_uri() -> str:
    """The store's address without passwords, to be printed."""
    return masked(store_uri())


@contextmanager
def store() -> "Iterator[tuple[MlflowClient, str]]":
    """A client and the id of the MLflow experiment, under a lock.

    Of several processes that open a fresh store at once, all but one would crash in its migrations.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    folder = project_root() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "mlflow.lock", timeout=LOCK_TIMEOUT, mode=0o666)  # for all users
    with lock:
        require_store(store_uri())
        require_usable(store_uri())
        _require_no_percent_sign()
        client = MlflowClient(tracking_uri=store_uri())
        yield client, _experiment(client)


def keep_view(client: "MlflowClient", experiment_id: str) -> None:
    """Give an experiment the view that links open, where an older version or someone else made it."""
    name, content = view.tag()
    if client.get_experiment(experiment_id).tags.get(name) != content:
        client.set_experiment_tag(experiment_id, name, content)


def experiment_id() -> str:
    """The MLflow experiment that runs are logged to; made when it isn't there."""
    with store() as (_, number):
        return number


def ui_address() -> str:
    """The server that MLFLOW_TRACKING_URI names, or the one that `make ui` starts."""
    uri = store_uri()
    if not uri.startswith("http"):
        return f"http://{HOST}:{PORT}"
    parts = urlsplit(uri)  # a link has no user and password in it
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def _experiment(client: "MlflowClient") -> str:
    name, number = (os.environ.get(f"MLFLOW_EXPERIMENT_{field}") for field in ("NAME", "ID"))
    by_number = client.get_experiment(number) if number and not name else None
    name = name or EXPERIMENT
    experiment = by_number or client.get_experiment_by_name(name)
    if experiment is None:
        experiment = _create_experiment(client, name)
    number = str(experiment.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the experiment {experiment.name!r} was deleted in MLflow; "
            f"`MLFLOW_TRACKING_URI={shown_uri()} mlflow experiments restore --experiment-id {number}` "
            "brings it back, and MLFLOW_EXPERIMENT_NAME names another one"
        )
    _update_paths(str(experiment.artifact_location))
    return number


def _create_experiment(client: "MlflowClient", name: str) -> "Experiment":
    from mlflow.exceptions import MlflowException

    location = None if store_uri().startswith("http") else (project_root() / ARTIFACTS).as_uri()
    try:
        number = client.create_experiment(name, location, tags=dict([view.tag()]))
        return client.get_experiment(number)
    except MlflowException as error:
        # the lock is of this project; someone else may have created it on the same server meanwhile
        experiment = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
            raise
        return experiment


def _require_no_percent_sign() -> None:
    """Check that MLflow can set up a database: its migration library (Alembic) takes no % in a path."""
    import mlflow

    folder = Path(mlflow.__file__).parent
    if "%" in str(folder) and not store_uri().startswith("http"):
        raise UserError(
            f"MLflow opens no database from {folder}, as there is a % in it; give the folder another "
            "name (`make setup` makes its .venv anew)"
        )


def _update_paths(location: str) -> None:
    """In the store of a project that was copied or moved, put this folder's paths for the old ones."""
    from sqlalchemy.engine import make_url

    root, uri = project_root(), store_uri()
    file, old = root / DATABASE, _former_root(location, root)
    if old is None or file.is_symlink() or not uri.startswith("sqlite"):
        return
    if make_url(uri).database != str(file):  # other projects may share it
        return
    with closing(sqlite3.connect(file)) as database, database:  # all or nothing
        for before, after in ((old.as_uri(), root.as_uri()), (str(old), str(root))):
            for table, column in PATH_COLUMNS:
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
    """The other project's folder in which a store's artifacts lie; None where they are to stay."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if not location.startswith("file:"):
        return None
    folder = Path(local_file_uri_to_path(location))
    old = folder.parent
    if folder.name != ARTIFACTS or old == root:
        return None
    try:
        # a folder that is no project was chosen for the artifacts by the user
        keep = old.samefile(root) or not (old / PROJECT_MARK).is_dir()
    except OSError:  # it is gone, or another user's
        keep = False
    return None if keep else old
