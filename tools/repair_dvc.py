"""Repair what DVC does not repair itself: before `make repro` runs DVC, and with --check after it.

DVC 3.67 writes dvc.lock and its list of locks in place. A kill in the middle of that leaves a file that
DVC refuses to read from then on. Nothing in them is needed: DVC's run cache has the stages' results.

DVC trusts every file of its cache, since it has made them read-only. A file whose bytes changed is
restored as it is, and running the stage again does not replace it. And DVC ends with status 0 when the
cache had no space for what the stages wrote.

Nor does DVC commit. `dvc exp` compares with the last commit and takes what is not committed into every
experiment, so --check prints the command that commits a result.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml
from dvc_data.hashfile.db import HashFileDB
from dvc_objects.errors import ObjectFormatError
from voluptuous import Invalid

from tools.command import Parser, command

LOCK = Path("dvc.lock")
READ_BY_DVC = (LOCK, Path("dvc.yaml"), Path("params.yaml"))
LIST_OF_LOCKS = Path(".dvc/tmp/rwlock")
# what Git has of a result: of models and plots .gitignore alone
COMMITTED = ("params.yaml", "dvc.lock", "metrics", "models", "plots")
CONFLICT = "<<<<<<<"
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")


def corrupted(folder: Path) -> list[Path]:
    """Which of the two files that DVC writes in place it could not read in this checkout."""
    names = []
    try:
        text = (folder / LOCK).read_text(encoding="utf-8") if (folder / LOCK).exists() else CONFLICT
        if CONFLICT not in text:  # the user has a merge to finish
            lock = parse_yaml(text, LOCK)
            if COMPILED_LOCKFILE_SCHEMA(lock) != lock:
                names.append(LOCK)  # a digest cut to its first digits: a number, on which DVC fails
    except (ValueError, YAMLFileCorruptedError, Invalid):
        names.append(LOCK)
    try:
        if (folder / LIST_OF_LOCKS).exists():
            json.loads((folder / LIST_OF_LOCKS).read_text(encoding="utf-8"))
    except ValueError:
        names.append(LIST_OF_LOCKS)
    return names


def require_plain_files(folder: Path) -> None:
    """Refuse pipes and devices in the place of DVC's files: DVC would read them without end."""
    for name in READ_BY_DVC:
        if (folder / name).exists() and not (folder / name).is_file():
            raise SystemExit(f"error: {name} is no plain file (nor a link to one); put the file there")


def remove_damaged(repo: Repo) -> Iterator[str]:
    """Remove the cache's files whose bytes do not have the MD5 that is their name; yields their paths.

    DVC remembers the digest of a file by its size and time, so only files written to since are read.
    """
    cache = repo.cache.local
    for digest in filter(OBJECT.fullmatch, cache.all()):  # others are temporary files of a running DVC
        try:
            HashFileDB.check(cache, digest)  # the check of the cache's own class trusts read-only files
        except ObjectFormatError:
            yield os.path.relpath(cache.oid_to_path(digest))


def missing_from_cache(repo: Repo) -> list[Output]:
    """The results of today's stages that dvc.lock names and the cache lacks."""
    return [out for out in repo.index.outs if out.use_cache and out.hash_info and out.changed_cache()]


def is_in_work_tree(out: Output) -> bool:
    """Whether the work tree has the bytes that dvc.lock names."""
    path = Path(out.fs_path)
    for file in [path, *path.rglob("*")] if path.exists() else ():
        if file.is_file():
            file.touch()  # else DVC takes the digest of the cache's file from which it copied this one
    return out.exists and not out.changed_checksum()


def copy_to_cache(out: Output) -> bool:
    """Fill the cache from the work tree; False where the cache can't be written."""
    try:
        out.commit()
    except OSError as error:
        print(f"{out}: {error}", file=sys.stderr)
    return not out.changed_cache()


def require_cached(repo: Repo, missing: list[Output]) -> None:
    if missing:
        raise SystemExit(
            f"error: {', '.join(map(str, missing))} could not be written to DVC's cache "
            f"({os.path.relpath(repo.cache.local.path)}; DVC says why above); free space, or give "
            "this user access to it, and repeat: they are copied there, and no stage has to run again"
        )


def uncommitted(folder: Path) -> list[str]:
    """Which of a result's names have what the last commit lacks; none outside a Git repository."""
    listed = subprocess.run(
        ["git", "status", "--porcelain", "-z", "--no-renames", "--", *COMMITTED],
        cwd=folder, check=False, capture_output=True, text=True,
    ).stdout  # fmt: skip
    paths = [entry[3:] for entry in listed.split("\0")]
    return [name for name in COMMITTED if any(f"{path}/".startswith(f"{name}/") for path in paths)]


def advise_commit(names: list[str]) -> None:
    if names:
        print(
            "Commit this result before a sweep: `dvc exp` compares with the last commit, and takes what "
            "is not committed into every experiment.\n"
            f'  git add {" ".join(names)} && git commit -m "results"'
        )


def repair_cache() -> None:
    """Remove damaged files from DVC's cache, and fill it with the results that the work tree has.

    Where the cache can't be filled no stage may run: DVC would first remove the stage's results.
    """
    with Repo() as repo, repo.lock:
        for path in remove_damaged(repo):
            print(f"{path} was damaged and is removed; DVC runs its stage again when it is needed")
        still_missing = []
        for out in filter(is_in_work_tree, missing_from_cache(repo)):
            if copy_to_cache(out):
                print(f"{out} was missing from the cache and is copied back from the work tree")
            else:
                still_missing.append(out)
        require_cached(repo, still_missing)


def add_options(parser: Parser) -> None:
    text = "only check that DVC cached all results, and say how to commit them"
    parser.add_argument("--check", action="store_true", help=text)


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    if arguments.check:
        with Repo() as repo:
            require_cached(repo, missing_from_cache(repo))
        advise_commit(uncommitted(Path()))
        return
    require_plain_files(Path())
    for name in corrupted(Path()):
        name.replace(f"{name}.corrupted")
        print(
            f"{name} was left corrupted when DVC was killed; it is kept as {name}.corrupted, and DVC "
            "writes a new one"
        )
    try:
        repair_cache()
    except (DvcException, OSError) as error:  # dvc repro says what else is wrong
        print(f"DVC's cache was not checked: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
