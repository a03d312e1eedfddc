"""The checks of a checkout after a fault and a plain `dvc repro`; each returns violations, in words."""

import contextlib
import fcntl
import hashlib
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from helpers.sandbox import digests

ORPHAN_SECONDS = 20.0  # in which a trainer notices that its DVC was killed, and ends


def different_outs(folder: Path, reference: Mapping[str, str], *, more: bool = False) -> list[str]:
    """Outs that are missing, new, or have other bytes than those of the undisturbed run.

    Args:
        more: whether there may be new ones.
    """
    outs = digests(folder)
    violations = [f"{name} is missing" for name in reference.keys() - outs.keys()]
    violations += [
        f"{name} differs" for name in reference.keys() & outs if outs[name] != reference[name]
    ]
    violations += [f"{name} is new" for name in outs.keys() - reference.keys() if not more]
    return sorted(violations)


def broken_objects(folder: Path) -> list[str]:
    """Files of DVC's cache whose bytes do not have the MD5 that is their name."""
    violations = []
    for path in sorted((folder / ".dvc/cache/files/md5").glob("??/*")):
        digest = path.parent.name + path.name.removesuffix(".dir")
        if path.suffix != ".tmp" and hashlib.md5(path.read_bytes()).hexdigest() != digest:
            violations.append(f"cached {path.relative_to(folder)} is damaged")
    return violations


def held_locks(folder: Path) -> list[str]:
    violations = []
    for path in sorted([*folder.glob(".resume/**/*.lock"), *folder.glob(".dvc/tmp/**/*lock")]):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                violations.append(f"{path.relative_to(folder)} is held")
    return violations


def leftovers(folder: Path) -> list[str]:
    """Half-written files, but for DVC's own, which `dvc gc` removes."""
    paths = [path for path in folder.rglob("*.tmp") if path.relative_to(folder).parts[0] != ".dvc"]
    paths += folder.glob(".resume/*.fresh.pt")
    return [f"{path.relative_to(folder)} is left over" for path in sorted(paths)]


def running_runs(store: Path) -> list[str]:
    """Runs of an MLflow database that are still RUNNING."""
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store)) as connection:  # also repairs a killed write
        rows = connection.execute(
            "select name, run_uuid from runs where status = 'RUNNING' and lifecycle_stage = 'active'"
        )
        return [f"run {name} ({run_id}) is left RUNNING" for name, run_id in rows]


def processes_in(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder.resolve():
                yield process


def left_processes(folder: Path, *, seconds: float = ORPHAN_SECONDS) -> list[str]:
    """Processes that still work in the folder after some seconds; they are killed."""
    deadline = time.monotonic() + seconds
    while (processes := list(processes_in(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    violations = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            violations.append(f"process {process.pid} is left: {' '.join(process.cmdline())}")
            process.kill()
    return violations


def unclean_status(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """What `dvc status` says, unless it is that everything is up to date."""
    done = subprocess.run(
        ["dvc", "status", "--json"], cwd=folder, env=dict(environment), text=True, capture_output=True,
        timeout=120,
    )  # fmt: skip
    if done.stdout.strip() == "{}":
        return []
    return [f"dvc status is not clean: {' '.join((done.stdout + done.stderr).split())[:500]}"]


def all_violations(
    folder: Path, *, outs: Mapping[str, str], store: Path, environment: Mapping[str, str]
) -> list[str]:
    return [
        *left_processes(folder),  # first, as an orphan may still write
        *different_outs(folder, outs),
        *broken_objects(folder),
        *held_locks(folder),
        *leftovers(folder),
        *running_runs(store),
        *unclean_status(folder, environment),
    ]
