"""What must hold in a checkout after a fault and a plain `dvc repro`; each check says what does not."""

import contextlib
import fcntl
import hashlib
import json
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from tools.sandbox import digests

ORPHAN_SECONDS = 20.0  # for a trainer whose DVC process was killed to notice, and to end
CLOCKED = "metrics/times/"  # outs whose digests in dvc.lock differ from run to run


def different_outs(folder: Path, truth: Mapping[str, str], *, others: bool = False) -> list[str]:
    """Outs that have other bytes than those of the run that nothing interrupted, are missing or new.

    Args:
        others: new ones are expected.
    """
    found = digests(folder)
    lost = [f"{name} is missing" for name in truth.keys() - found.keys()]
    lost += [f"{name} differs" for name in truth.keys() & found.keys() if found[name] != truth[name]]
    lost += [f"{name} is new" for name in found.keys() - truth.keys() if not others]
    return sorted(lost)


def lock_entries(folder: Path) -> dict[str, Any]:
    """What dvc.lock says on each stage, but for what depends on the clock; nothing without the file.

    Raises:
        ValueError: it is torn.
    """
    path = folder / "dvc.lock"
    try:
        stages = yaml.safe_load(path.read_text())["stages"] if path.exists() else {}
        return {name: _lasting(entry) for name, entry in stages.items()}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"dvc.lock can't be read: {' '.join(str(error).split())}") from error


def _lasting(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {
        kind: [row for row in entry[kind] if not row["path"].startswith(CLOCKED)]
        for kind in ("deps", "outs")
        if kind in entry
    }
    return entry | kept


def different_entries(folder: Path, truth: Mapping[str, Any]) -> list[str]:
    """Stages on which dvc.lock says something else than after the run that nothing interrupted."""
    try:
        found = lock_entries(folder)
    except ValueError as error:
        return [str(error)]
    return [f"dvc.lock on {name} differs" for name in truth if found.get(name) != truth[name]]


def broken_objects(folder: Path) -> list[str]:
    """Files of DVC's cache whose content is not the one that their name says."""
    cache, broken = folder / ".dvc/cache/files/md5", []
    for path in sorted(cache.glob("??/*")):
        wanted = path.parent.name + path.name.removesuffix(".dir")
        if path.suffix != ".tmp" and hashlib.md5(path.read_bytes()).hexdigest() != wanted:
            broken.append(f"cached {path.relative_to(folder)} is damaged")
    return broken


def held_locks(folder: Path) -> list[str]:
    """Lock files that nobody can take, and entries of dead processes in DVC's list of locks."""
    held = []
    for path in sorted([*folder.glob(".resume/**/*.lock"), *folder.glob(".dvc/tmp/**/*lock")]):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(f"{path.relative_to(folder)} is held")
    return held + _dvc_lock_entries(folder)


def _dvc_lock_entries(folder: Path) -> list[str]:
    path = folder / ".dvc/tmp/rwlock"
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return [f"{path.relative_to(folder)} is no JSON"]
    holders = {int(row["pid"]) for kind in content.values() for row in _rows(kind.values())}
    return [  # those of dead processes are no locks: DVC passes them over
        f"{path.relative_to(folder)} has an entry of process {pid}, which is alive"
        for pid in sorted(holders)
        if psutil.pid_exists(pid)
    ]


def _rows(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """Those of readers are lists, those of writers are not."""
    return [row for entry in entries for row in (entry if isinstance(entry, list) else [entry])]


def leftovers(folder: Path) -> list[str]:
    """Half-written files. Not DVC's own, which `dvc gc` removes."""
    halves = [path for path in folder.rglob("*.tmp") if path.relative_to(folder).parts[0] != ".dvc"]
    halves += folder.glob(".resume/*.fresh.pt")
    return [f"{path.relative_to(folder)} is left over" for path in sorted(halves)]


def running_runs(store: Path) -> list[str]:
    """MLflow runs of a sqlite store that are still RUNNING."""
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store)) as connection:  # may write: it mends a killed write
        rows = connection.execute(
            "select name, run_uuid from runs where status = 'RUNNING' and lifecycle_stage = 'active'"
        )
        return [f"run {name} ({run_id}) is left RUNNING" for name, run_id in rows]


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder.resolve():
                found.append(process)
    return found


def left_processes(folder: Path, *, patience: float = ORPHAN_SECONDS) -> list[str]:
    """Processes that still work in the folder after a while; they are killed."""
    deadline = time.monotonic() + patience
    while (left := processes_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    said = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            said.append(f"process {process.pid} is left: {' '.join(process.cmdline())}")
            process.kill()
    return said


def is_clean(folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether `dvc status` says that all is up to date."""
    done = subprocess.run(
        ["dvc", "status", "--quiet"], cwd=folder, env=dict(environment), capture_output=True, timeout=120
    )
    return done.returncode == 0


def unclean_status(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """What `dvc status` says, when it is not that all is up to date."""
    if is_clean(folder, environment):
        return []
    done = subprocess.run(
        ["dvc", "status"], cwd=folder, env=dict(environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    return [f"dvc status is not clean: {' '.join(done.stdout.split())[:500]}"]


def premature(
    folder: Path, stage: str, truth: Mapping[str, str], environment: Mapping[str, str]
) -> list[str]:
    """Whether `dvc status` takes an interrupted stage for a finished one."""
    try:
        entered = stage in lock_entries(folder)
    except ValueError:
        return []  # then DVC says so, and the next repro is what counts
    if not entered or not different_outs(folder, truth) or not is_clean(folder, environment):
        return []
    return [f"dvc status is clean, and {different_outs(folder, truth)[0]}"]


def losses(
    folder: Path,
    *,
    outs: Mapping[str, str],
    entries: Mapping[str, Any],
    store: Path,
    environment: Mapping[str, str],
) -> list[str]:
    """All that does not hold, after the last `dvc repro` has ended."""
    return [
        *left_processes(folder),  # first: what an orphan still writes is then seen
        *different_outs(folder, outs),
        *different_entries(folder, entries),
        *broken_objects(folder),
        *held_locks(folder),
        *leftovers(folder),
        *running_runs(store),
        *unclean_status(folder, environment),
    ]
