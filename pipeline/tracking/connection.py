"""A store that is away: how long it is waited for, what is said, and whether a stage goes on without it.

MLflow's own patience is minutes for each call: 120 s, seven times again, over HTTP; 100 s for an SQLite
file that can't be opened. Here a call gets seconds, because StageRun tries again later.
"""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import printable, truncate

VARIABLE = "BLOCKDROP_TRACKING"
OFF, STRICT = "off", "strict"
SQLITE = "sqlite:///"
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")  # MLflow's own variables
# signs of long stories by urllib3 and SQLAlchemy, whose end says what happened
WORDY = ("Max retries exceeded", "https://sqlalche.me")
LONG_REASON = 160  # characters, of which the first sentence is enough
LONGEST_REASON = 300  # some servers answer with a page
REMEDIES = {  # by what a reason holds
    "code 401": f"set {' and '.join(CREDENTIALS)}",
    "Connection refused": "start the server that MLFLOW_TRACKING_URI names, or unset it",
    "Name or service not known": "mend the server's name in MLFLOW_TRACKING_URI, or unset it",
    "No module named": "install the database's driver into .venv, or name another store by "
    "MLFLOW_TRACKING_URI",
    "Databricks": "`pip install databricks-sdk` and log in, or name another store by "
    "MLFLOW_TRACKING_URI",
}
SQLITE_PATIENCE = 5.0  # seconds for a file that another process has locked
USERINFO = re.compile(r"://(?:([^\s:/@]+):)?\S*@")
SECRETS = re.compile(r"([?&][\w-]*(?:password|passwd|pwd|secret|token)[\w-]*=)[^&\s]+", re.IGNORECASE)


class TrackingError(UserError):
    """MLflow can't be used, and the user wants no stage to go on without it."""


def mode() -> str:
    """What BLOCKDROP_TRACKING wants: off, strict, or (empty) to log and to go on when MLflow is away.

    Raises:
        UserError: it says something else.
    """
    told = os.environ.get(VARIABLE, "")
    if told not in ("", OFF, STRICT):
        raise UserError(
            f"{VARIABLE} is {told!r}; set it to {OFF} (nothing is logged) or {STRICT} (a stage fails "
            "when MLflow is away), or unset it (a stage goes on when MLflow is away)"
        )
    return told


def masked(text: str) -> str:
    """A text without the passwords and tokens of the URIs in it."""

    def hide(found: re.Match[str]) -> str:
        return f"://{found[1]}:***@" if found[1] else "://***@"

    return SECRETS.sub(r"\1***", USERINFO.sub(hide, text))


def reason(error: BaseException, outer: BaseException | None = None) -> str:
    """What went wrong, in a line.

    Args:
        outer: what was handled already when it happened (Ctrl-C, say): that is no cause of it.
    """
    if any(sign in str(error) for sign in WORDY):
        while (deeper := error.__cause__ or error.__context__) not in (None, outer):
            error = deeper
    lines = str(error).strip().splitlines() or [type(error).__name__]
    whole = printable(masked(lines[0]))
    line = truncate(whole if len(whole) <= LONG_REASON else whole.split(". ")[0], LONGEST_REASON)
    remedy = next((words for sign, words in REMEDIES.items() if sign in line), None)
    return f"{line}; {remedy}" if remedy else line


@contextmanager
def http_timeout(seconds: float, *, retries: int = 0, always: bool = False) -> Iterator[None]:
    """Let MLflow's HTTP calls in here give up after `seconds`; it reads these variables at every call.

    Without retries no call is made twice: one that creates a run, and whose answer is late, would create
    two. A server's Retry-After is not obeyed, it may be an hour.

    Args:
        always: also where the user has set other values, which otherwise count.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(seconds))),  # whole numbers, or MLflow fails
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password in it
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: text for name, text in wanted.items() if always or before[name] is None})
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


@contextmanager
def silence_mlflow() -> Iterator[None]:
    """Without what MLflow and urllib3 say themselves of a failure: pages, at every attempt."""
    import mlflow.tracking  # noqa: F401  # sets levels of its own when it is imported

    loggers = [logging.getLogger(name) for name in ("mlflow", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def require_store(uri: str) -> None:
    """See that a URI names a kind of store that MLflow has.

    Raises:
        UserError: it is a folder, or a server without its protocol.
    """
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):  # MLflow's own variable
        return
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}, without its protocol; write http://{uri}")
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith(("databricks", "uc"))):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {masked(uri)}, and MLflow keeps no runs in folders any more; write "
            "sqlite:///mlflow.db or a server's http://HOST:PORT, or unset it"
        )


def require_usable(uri: str, *, seconds: float | None = None) -> None:
    """Find out within seconds that an SQLite file is locked, read-only, or none.

    Args:
        seconds: to wait for another process that has it locked; None: SQLITE_PATIENCE.

    Raises:
        OSError: the file, or its folder, can't be written to.
        sqlite3.Error: the file can't be used.
    """
    from sqlalchemy.engine import make_url

    if not uri.startswith(SQLITE):
        return
    path = Path(make_url(uri).database or "").absolute()
    folder = next(parent for parent in path.parents if parent.exists())  # MLflow makes the others
    for place in (folder, path):  # the journal goes to the folder
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(f"{place} can't be written to")
    if path.exists():
        http_timeout = SQLITE_PATIENCE if seconds is None else min(seconds, SQLITE_PATIENCE)
        where = f"{path.as_uri()}?mode=rw"
        with closing(
            sqlite3.connect(where, uri=True, timeout=http_timeout, isolation_level=None)
        ) as file:
            file.execute("BEGIN IMMEDIATE")
            file.execute("ROLLBACK")


class Bounded:
    """An MlflowClient that begins no call after `until`, by time.monotonic()."""

    def __init__(self, client: Any, until: float) -> None:
        self._client = client
        self._until = until

    def has_time(self) -> bool:
        """Whether a call may still be made."""
        return time.monotonic() < self._until

    def __getattr__(self, name: str) -> Any:
        if not self.has_time():
            raise TimeoutError("it answers too slowly")
        return getattr(self._client, name)
