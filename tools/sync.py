"""Bring MLflow up to date with DVC: one finished parent run for every experiment (`make sync`).

Stages that DVC takes from its cache run no code and so log nothing; a colleague's experiments
(`dvc exp pull`) never ran here; a server may have been away. Their files say all that is to be logged.
Run it as often as you like: what is there is not logged again.
"""

import argparse
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.infra.errors import UserError
from pipeline.infra.locks import exclusive
from pipeline.infra.resume import project_root
from pipeline.infra.safe_io import printable
from pipeline.tracking import dvc_results, experiment_runs, overview
from pipeline.tracking.connection import http_timeout, reason, silence_mlflow
from pipeline.tracking.dvc_results import Record, RecordError, UnfinishedError
from pipeline.tracking.runs import TAG_KEY, baseline_commit, end_orphans
from pipeline.tracking.store import is_off, shown_uri, store
from tools.command import command

LOCK = Path(".dvc/tmp/blockdrop-sync.lock")
PATIENCE = 30.0  # seconds for a call, twice: longer than a stage's, because models are uploaded


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A DVC experiment as its Git reference names it."""

    name: str
    baseline: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The run of the work tree's own result (empty without one), and the experiments that failed."""

    run_id: str
    failed: tuple[str, ...]


def references(root: Path) -> list[Reference]:
    """Every experiment that DVC knows here, of all commits.

    Raises:
        UserError: it can't say, where there is no Git repository for example.
    """
    try:
        with Repo(str(root)) as repo:
            listed = repo.experiments.ls(all_commits=True)
    except DvcException as error:
        remedy = "`git init` makes one" if not (root / ".git").exists() else "`dvc exp list -A` shows it"
        raise UserError(
            f"DVC can't list the experiments ({error}), so none is logged; {remedy}"
        ) from None
    return [
        Reference(name=name, baseline=baseline, revision=revision)
        for baseline, found in listed.items()
        for name, revision in found
    ]


def read(reference: Reference, root: Path) -> Record:
    """What an experiment gave.

    Raises:
        RecordError: it isn't finished.
        DvcException: DVC can't read it.
    """
    files = DVCFileSystem(str(root), rev=reference.revision)
    return dvc_results.read(
        files, name=reference.name, baseline=reference.baseline, revision=reference.revision
    )


def log(reference: Reference, root: Path, names: Container[str]) -> None:
    """Log what MLflow lacks of an experiment, under the name that it has now.

    Args:
        names: of all experiments that have its commit.

    Raises:
        RecordError: its files can't be used.
        DvcException: DVC can't read it.
    """
    name = printable(reference.name)
    with store() as (client, experiment_id):
        logged = experiment_runs.logged(client, experiment_id, reference.revision)
    former = logged and logged.data.tags.get(experiment_runs.TAG_NAME)
    if logged and (former == reference.name or former in names):  # else `dvc exp rename` was there
        return
    try:
        record = read(reference, root)
    except UnfinishedError as error:
        print(f"{name}: not logged, {error}")
        return
    if logged:
        experiment_runs.rename(client, logged, record)
    if not record.is_whole():
        print(f"{name}: its files are in no cache here; `dvc fetch` may bring them")
    experiment_runs.complete(record, finish=True)
    print(f"{name}: " + (f"renamed, it was {printable(former)}" if logged else "logged"))


def work_tree(root: Path) -> str | None:
    """The run of the work tree's own result, completed when it is no experiment's; None without one."""
    try:
        files = dvc_results.work_tree(str(root))
        record = dvc_results.read(files, name="", baseline=baseline_commit())
    except RecordError as error:  # dvc.lock may be under way, of a merge say
        print(f"work tree: not logged, {error}")
        return None
    with store() as (client, experiment_id):
        found = experiment_runs.find(client, experiment_id, record)
        if found is not None and client.get_run(found).data.tags.get(TAG_KEY) != record.key:
            return found  # an experiment was applied, or a result was committed: the same one
    return experiment_runs.complete(record, finish=True)


def sync(root: Path) -> Outcome:
    """Complete every experiment's parent run, whatever becomes of the others.

    Raises:
        UserError: DVC can't say which experiments there are.
        Exception: the store can't be used.
    """
    failed = []
    with exclusive(root / LOCK, waiting="sync: waiting for another one to end"):
        with store() as (client, experiment_id):
            for run_id in end_orphans(client, experiment_id):
                print(f"run {run_id} was left by a process that died; it is ended as KILLED")
        known = references(root)
        for reference in known:
            names = {other.name for other in known if other.revision == reference.revision}
            try:
                log(reference, root, names)
            except Exception as error:  # of any kind: its files may be anybody's
                failed.append(_passed_over(reference.name, error))
        run_id = None
        try:
            run_id = work_tree(root)
        except Exception as error:  # likewise
            failed.append(_passed_over("work tree", error))
        return Outcome(run_id=run_id or "", failed=tuple(failed))


def _passed_over(name: str, error: Exception) -> str:
    """Say why an experiment is not logged, unless it is the store that can't be used; its name."""
    with store():  # which raises then
        pass
    print(f"{printable(name)}: not logged, {reason(error)}", file=sys.stderr)
    return name


@contextmanager
def usable_store() -> Iterator[None]:
    """End in one line, not in a traceback, when the store can't be used."""
    try:
        with http_timeout(PATIENCE, retries=1), silence_mlflow():
            yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # whatever its library raises; what is to be logged lies in files
        message = f"error: {shown_uri()} can't be used ({reason(error)}); start it, then `make sync`"
        print(message, file=sys.stderr)
        sys.exit(1)


@command()
def main(_: argparse.Namespace) -> None:
    """Sync, then show what there is and where to look at it."""
    if is_off():
        print("BLOCKDROP_TRACKING=off: nothing is logged")
        return
    with usable_store():
        outcome = sync(project_root())
        overview.say(outcome.run_id)
    if outcome.failed:
        names = ", ".join(map(printable, outcome.failed))
        sys.exit(f"error: {names}: not logged, for the reasons above; all others are")


if __name__ == "__main__":
    main()
