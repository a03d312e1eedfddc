"""Bring MLflow up to date with DVC: one finished parent run for every experiment (`make sync`).

Stages that DVC takes from its cache run no code and so log nothing; a colleague's experiments
(`dvc exp pull`) never ran here; a server may have been away. Their files say all that is to be logged.
Run it as often as you like: what is there is not logged again.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.errors import UserError
from pipeline.locks import alone
from pipeline.resume import project_root
from pipeline.tracking import overview, parents, records
from pipeline.tracking.reach import patience, quietly, reason
from pipeline.tracking.records import Record, RecordError
from pipeline.tracking.runs import TAG_KEY, baseline_commit, end_orphans
from pipeline.tracking.store import is_off, shown_uri, store
from tools.command import Parser

LOCK = Path(".dvc/tmp/blockdrop-sync.lock")
PATIENCE = 30.0  # seconds for a call, twice: longer than a stage's, because models are uploaded


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A DVC experiment as its Git reference names it."""

    name: str
    baseline: str
    revision: str


def references(root: Path) -> list[Reference]:
    """Every experiment that DVC knows here, of all commits."""
    with Repo(str(root)) as repo:
        listed = repo.experiments.ls(all_commits=True)
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
    return records.read(
        files, name=reference.name, baseline=reference.baseline, revision=reference.revision
    )


def missing(root: Path) -> Iterator[Record]:
    """Experiments that MLflow has not all of; those that can't be read are said and passed over."""
    with store() as (client, experiment_id):
        pass
    for reference in references(root):
        wanted = (
            f"tags.`{parents.TAG_REVISION}` = '{reference.revision}' and attributes.status = 'FINISHED'"
        )
        if client.search_runs([experiment_id], filter_string=wanted, max_results=1):
            continue
        try:
            record = read(reference, root)
        except (RecordError, DvcException) as error:
            print(f"{reference.name}: not logged, {error}")
            continue
        if not record.is_whole():
            print(f"{reference.name}: its files are in no cache here; `dvc fetch` may bring them")
        yield record


def work_tree(root: Path) -> str | None:
    """The run of the work tree's own result, completed when it is no experiment's; None without one."""
    try:
        files = records.work_tree(str(root))
        record = records.read(files, name="", baseline=baseline_commit())
    except RecordError as error:
        print(f"work tree: not logged, {error}")
        return None
    with store() as (client, experiment_id):
        found = parents.find(client, experiment_id, record)
        if found is not None and client.get_run(found).data.tags.get(TAG_KEY) != record.key:
            return found  # an experiment was applied, or a result was committed: the same one
    return parents.complete(record, finish=True)


def sync(root: Path) -> str | None:
    """Complete every experiment's parent run; the id of the work tree's."""
    with alone(root / LOCK, waiting="sync: waiting for another one to end"):
        with store() as (client, experiment_id):
            for run_id in end_orphans(client, experiment_id):
                print(f"run {run_id} was left by a process that died; it is ended as KILLED")
        for record in missing(root):
            parents.complete(record, finish=True)
            print(f"{record.name}: logged")
        return work_tree(root)


@contextmanager
def usable_store() -> Iterator[None]:
    """End in one line, not in a traceback, when the store can't be used."""
    try:
        with patience(PATIENCE, retries=1), quietly():
            yield
    except Exception as error:  # whatever its library raises; what is to be logged lies in files
        message = f"error: {shown_uri()} can't be used ({reason(error)}); start it, then `make sync`"
        print(message, file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Sync, then show what there is and where to look at it."""
    try:
        off = is_off()
    except UserError as error:
        sys.exit(f"error: {error}")
    if off:
        print("BLOCKDROP_TRACKING=off: nothing is logged")
        return
    with usable_store():
        overview.say(sync(project_root()) or "")


if __name__ == "__main__":
    Parser(description=__doc__).parse_args()
    main()
