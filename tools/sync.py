"""Bring MLflow up to date with DVC: one finished parent run for every experiment (`make sync`).

A stage logs to MLflow while it runs, as long as MLflow answers. Stages that DVC takes from its cache run
no code, a colleague's experiments (`dvc exp pull`) never ran here, a server may have been away: this
command logs what MLflow lacks from the experiments' files. Nothing is logged twice: run it at any time.
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
from pipeline.tracking import dvc_results, experiment_runs, older_runs, overview
from pipeline.tracking.connection import OFF, http_timeout, mode, reason, silence_mlflow
from pipeline.tracking.dvc_results import Record, RecordError, UnfinishedError
from pipeline.tracking.identity import baseline_commit
from pipeline.tracking.runs import TAG_KEY, end_orphans
from pipeline.tracking.store import keep_view, shown_uri, store
from tools.command import command

LOCK = Path(".dvc/tmp/blockdrop-sync.lock")
# DVC's table in 80 columns: all of its columns, more than two hundred, fit no terminal
HEADLINE = "Experiment|gamma|accuracy|blocks_mean|flops_saved"
EXPERIMENTS = f"dvc exp show --no-pager --drop '.*' --keep '({HEADLINE})$'"
TIMEOUT = 30.0  # seconds for a call, which is repeated once: models are uploaded


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A DVC experiment as its Git reference names it."""

    name: str
    baseline: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The run of the work tree's result (empty without one), and the experiments that failed."""

    run_id: str
    failed: tuple[str, ...]


def references(root: Path) -> list[Reference]:
    """Every experiment that DVC knows here, of all commits.

    Raises:
        UserError: DVC can't list them, where there is no Git repository for example.
    """
    try:
        with Repo(str(root)) as repo:
            by_baseline = repo.experiments.ls(all_commits=True)
    except DvcException as error:
        remedy = "`git init` makes one" if not (root / ".git").exists() else "`dvc exp list -A` shows it"
        raise UserError(
            f"DVC can't list the experiments ({error}), so none is logged; {remedy}"
        ) from None
    return [
        Reference(name=name, baseline=baseline, revision=revision)
        for baseline, experiments in by_baseline.items()
        for name, revision in experiments
    ]


def read(reference: Reference, root: Path) -> Record:
    """The record of an experiment.

    Raises:
        RecordError: it isn't finished.
        DvcException: DVC can't read it.
    """
    files = DVCFileSystem(str(root), rev=reference.revision)
    return dvc_results.read(files, **vars(reference))


def log(reference: Reference, root: Path, names: Container[str]) -> None:
    """Log what MLflow lacks of an experiment, under its present name.

    Raises:
        RecordError: its files can't be used.
        DvcException: DVC can't read it.
    """
    name = printable(reference.name)
    with store() as (client, experiment_id):
        run = experiment_runs.find_complete(client, experiment_id, reference.revision)
    former = run and run.data.tags.get(experiment_runs.TAG_NAME)
    if run and (former == reference.name or former in names):  # else `dvc exp rename` has renamed it
        return
    try:
        record = read(reference, root)
    except UnfinishedError as error:
        print(f"{name}: not logged, {error}")
        return
    if run:
        experiment_runs.rename(client, run, record)
    if not record.is_whole():
        print(f"{name}: its files are in no cache here; `dvc fetch` may bring them")
    experiment_runs.complete(record, finish=True)
    print(f"{name}: " + (f"renamed, it was {printable(former)}" if run else "logged"))


def work_tree(root: Path) -> str | None:
    """The run of the work tree's result, completed unless it is a DVC experiment's; None without one."""
    try:
        files = dvc_results.work_tree(str(root))
        record = dvc_results.read(files, name="", baseline=baseline_commit())
    except RecordError as error:  # dvc.lock may be half merged, say
        print(f"work tree: not logged, {error}")
        return None
    with store() as (client, experiment_id):
        run = experiment_runs.find(client, experiment_id, record)
    if run is not None and run.data.tags.get(TAG_KEY) != record.key:
        return str(run.info.run_id)  # an experiment was applied, or a result was committed: the same one
    return experiment_runs.complete(record, finish=True)


def sync(root: Path) -> Outcome:
    """Complete every experiment's parent run; one that fails does not stop the others.

    Raises:
        UserError: DVC can't list the experiments.
        Exception: the store can't be used.
    """
    failed = []
    with exclusive(root / LOCK, waiting_message="sync: waiting for another one to end"):
        with store() as (client, experiment_id):
            keep_view(client, experiment_id)
            older_runs.bring_up_to_date(client, experiment_id)
            for orphan in end_orphans(client, experiment_id):
                print(f"run {orphan} was left by a process that died; it is ended as KILLED")
        all_references = references(root)
        for reference in all_references:
            names = {other.name for other in all_references if other.revision == reference.revision}
            try:
                log(reference, root, names)
            except Exception as error:  # of any kind: others may have written its files
                failed.append(_report_failure(reference.name, error))
        run_id = None
        try:
            run_id = work_tree(root)
        except Exception as error:  # likewise
            failed.append(_report_failure("work tree", error))
        return Outcome(run_id=run_id or "", failed=tuple(failed))


def _report_failure(name: str, error: Exception) -> str:
    """Print why an experiment is not logged, and return its name; raise when the store can't be used."""
    with store():
        pass
    print(f"{printable(name)}: not logged, {reason(error)}", file=sys.stderr)
    return name


@contextmanager
def usable_store() -> Iterator[None]:
    """End in one line instead of a traceback when the store can't be used."""
    try:
        with http_timeout(TIMEOUT, retries=1), silence_mlflow():
            yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # of any kind; nothing is lost, because the results are in files
        message = f"error: {shown_uri()} can't be used ({reason(error)}); start it, then `make sync`"
        print(message, file=sys.stderr)
        sys.exit(1)


@command()
def main(_: argparse.Namespace) -> None:
    if mode() == OFF:
        print("BLOCKDROP_TRACKING=off: nothing is logged")
        return
    with usable_store():
        outcome = sync(project_root())
        overview.say(outcome.run_id)
        print(f"the experiments of the last commit, by DVC alone:\n  {EXPERIMENTS}")
    if outcome.failed:
        names = ", ".join(map(printable, outcome.failed))
        sys.exit(f"error: {names}: not logged, for the reasons above; all others are")


if __name__ == "__main__":
    main()
