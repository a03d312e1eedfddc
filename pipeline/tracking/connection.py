"""The connection to MLflow: what BLOCKDROP_TRACKING asks for, timeouts, and one line on a failure.

MLflow itself waits for minutes at each call: 120 s and seven retries over HTTP, 100 s for an SQLite
file that can't be opened. Here a call gets seconds, because no stage depends on its answer.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import printable, truncate

VARIABLE = "BLOCKDROP_TRACKING"
OFF, STRICT = "off", "strict"
SQLITE = "sqlite:///"
SQLITE_TIMEOUT = 5.0  # seconds for a file that another process has locked
LONG_REASON = 160  # characters, of which the first sentence is enough
LONGEST_REASON = 300  # some servers answer with a page
# signs of urllib3's and SQLAlchemy's long messages, whose cause says what happened
WRAPPED = ("Max retries exceeded", "https://sqlalche.me")
REMEDIES = {  # by a part of the reason
    "code 401": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "Connection refused": "start the server that MLFLOW_TRACKING_URI names, or unset it",
    "Name or service not known": "correct the server's name in MLFLOW_TRACKING_URI, or unset it",
    "CERTIFICATE_VERIFY_FAILED": "name the server's certificate in MLFLOW_TRACKING_SERVER_CERT_PATH",
    "Invalid Host header": "name the host in the server's --allowed-hosts",
    "Request Entity Too Large": "let the proxy take larger files (nginx: client_max_body_size 0)",
    "No module named": "install the database's driver into .venv, or name another store by "
    "MLFLOW_TRACKING_URI",
    "Databricks": "`pip install databricks-sdk` and log in, or name another store by "
    "MLFLOW_TRACKING_URI",
}
USERINFO = re.compile(r"://(?:([^\s:/@]+):)?\S*@")
SECRETS = re.compile(r"([?&][\w-]*(?:password|passwd|pwd|secret|token)[\w-]*=)[^&\s]+", re.IGNORECASE)


class TrackingError(UserError):
    """MLflow can't be used, and the user wants no stage to run without it."""


def mode() -> str:
    """The value of BLOCKDROP_TRACKING: off, strict, or empty (log, and continue when MLflow is away).

    Raises:
        UserError: it has another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", OFF, STRICT):
        raise UserError(
            f"{VARIABLE} is {value!r}; set it to {OFF} (nothing is logged) or {STRICT} (a stage fails "
            "when MLflow is away), or unset it (a stage goes on when MLflow is away)"
        )
    return value


def masked(text: str) -> str:
    """A text without the passwords and tokens of the URIs in it."""
    text = USERINFO.sub(lambda match: f"://{match[1]}:***@" if match[1] else "://***@", text)
    return SECRETS.sub(r"\1***", text)


def reason(error: BaseException, handled: BaseException | None = None) -> str:
    """What went wrong, in a line, with its remedy where one is known.

    Args:
        handled: an exception that was being handled when `error` happened (Ctrl-C, say); Python chains
            the two, but it is no cause.
    """
    if any(sign in str(error) for sign in WRAPPED):
        while (cause := error.__cause__ or error.__context__) not in (None, handled):
            error = cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = printable(masked(lines[0]))
    line = truncate(line if len(line) <= LONG_REASON else line.split(". ")[0], LONGEST_REASON)
    remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in lines[0]), None)
    return f"{line}; {remedy}" if remedy else line


@contextmanager
def http_timeout(seconds: float, *, retries: int = 0, override: bool = False) -> Iterator[None]:
    """Let MLflow's HTTP calls give up after `seconds`; MLflow reads these variables at every call.

    Without retries no call is made twice: one that creates a run, and whose answer is late, would create
    two. A server's Retry-After is not obeyed, it may be an hour.

    Args:
        override: also where the user has set these variables; otherwise the user's values count.
    """
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(seconds))),  # MLflow takes whole numbers alone
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    }
    with _environment({k: v for k, v in variables.items() if override or k not in os.environ}):
        yield


@contextmanager
def silence_mlflow() -> Iterator[None]:
    """Switch off what MLflow and urllib3 print: pages at every failure, links, progress bars."""
    import mlflow.tracking  # noqa: F401  # the import sets log levels

    loggers = [logging.getLogger(name) for name in ("mlflow", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    variables = {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL may hold a password
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    try:
        with _environment(variables):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def require_store(uri: str) -> None:
    """Check that a URI names a kind of store that MLflow has.

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


def require_usable(uri: str, *, seconds: float = SQLITE_TIMEOUT) -> None:
    """Check within seconds that an SQLite file is a database, unlocked and writable.

    Raises:
        OSError: the file, or its folder, can't be written to.
        sqlite3.Error: the file can't be used.
    """
    from sqlalchemy.engine import make_url

    if not uri.startswith(SQLITE):
        return
    file = Path(make_url(uri).database or "").absolute()
    folder = next(parent for parent in file.parents if parent.exists())  # MLflow makes the others
    for path in (folder, file):  # the journal goes to the folder
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} can't be written to")
    if file.exists():
        address, timeout = f"{file.as_uri()}?mode=rw", min(seconds, SQLITE_TIMEOUT)
        with closing(
            sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None)
        ) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
