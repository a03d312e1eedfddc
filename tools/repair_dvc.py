"""Mend what DVC does not mend itself, before `make repro` runs it; afterwards see that nothing is lost.

DVC 3.67 writes dvc.lock and its list of locks in place; killed in the middle of that it refuses to read
them ever after. DVC finds again all that is in them: its run cache has the results of the stages.

It takes every file of its cache for whole, since it has made them read-only: one whose bytes changed is
restored as it is, and making the result anew does not replace it. And it ends with status 0 when what
the stages wrote did not fit into the cache.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from dvc_objects.errors import ObjectFormatError

from tools.command import Parser

LOCK = Path("dvc.lock")
READ_BY_DVC = (LOCK, Path("dvc.yaml"), Path("params.yaml"))
LIST_OF_LOCKS = Path(".dvc/tmp/rwlock")
CONFLICT = "<<<<<<<"
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")


def torn(folder: Path) -> list[Path]:
    """Which of the two files of a checkout can't be read."""
    found = []
    try:
        text = (folder / LOCK).read_text(encoding="utf-8") if (folder / LOCK).exists() else CONFLICT
        if CONFLICT not in text:  # a merge that is under way is its user's
            stages = yaml.safe_load(text)["stages"]
            [(entry["cmd"], entry["outs"][0]["path"]) for entry in stages.values()]
    except (ValueError, yaml.YAMLError, TypeError, KeyError, IndexError, AttributeError):
        found.append(LOCK)
    try:
        if (folder / LIST_OF_LOCKS).exists():
            json.loads((folder / LIST_OF_LOCKS).read_text(encoding="utf-8"))
    except ValueError:
        found.append(LIST_OF_LOCKS)
    return found


def require_plain(folder: Path) -> None:
    """DVC would wait for a pipe for ever, and read a device without end."""
    for name in READ_BY_DVC:
        if (folder / name).exists() and not (folder / name).is_file():
            raise SystemExit(f"error: {name} is no plain file (nor a link to one); put the file there")


def mend(folder: Path) -> list[Path]:
    """Put them aside, where somebody who wonders finds them; their names."""
    names = torn(folder)
    for name in names:
        (folder / name).replace(folder / f"{name}.torn")
    return names


def remove_damaged(repo: Repo) -> Iterator[str]:
    """Remove from the cache what is not what its name, an MD5, says; the files' paths.

    DVC remembers sizes and times, so only what was written to since is read again.
    """
    cache = repo.cache.local
    for digest in filter(OBJECT.fullmatch, cache.all()):  # others are being written by a DVC
        try:
            HashFileDB.check(cache, digest)  # the cache's own method trusts what is read-only
        except ObjectFormatError:
            yield os.path.relpath(cache.oid_to_path(digest))


def lost(repo: Repo) -> list[Output]:
    """What dvc.lock names and the cache lacks, of the stages that there are."""
    return [out for out in repo.index.outs if out.use_cache and out.hash_info and out.changed_cache()]


def in_work_tree(out: Output) -> bool:
    """Whether the work tree has what dvc.lock names; its digest is taken anew."""
    path = Path(out.fs_path)
    for file in [path, *path.rglob("*")] if path.exists() else ():
        if file.is_file():
            file.touch()  # DVC took the digest from the cache, if it copied the file from there
    return out.exists and not out.changed_checksum()


def put_back(out: Output) -> bool:
    """Fill the cache from the work tree; False where it can't be written."""
    try:
        out.commit()
    except OSError as error:
        print(f"{out}: {error}", file=sys.stderr)
    return not out.changed_cache()


def refuse(repo: Repo, outs: list[Output]) -> None:
    """End with status 1 if there are results that the cache did not take."""
    if outs:
        raise SystemExit(
            f"error: {', '.join(map(str, outs))} could not be written to DVC's cache "
            f"({os.path.relpath(repo.cache.local.path)}; DVC says why above); free space, or give "
            "this user access to it, and repeat: they are put there, and no stage runs for it"
        )


def mend_cache() -> None:
    """See that what is in DVC's cache is whole, and all there that the work tree has.

    Where it can't be filled nothing may run: DVC would remove the results, and make them anew.
    """
    with Repo() as repo, repo.lock:
        for path in remove_damaged(repo):
            print(f"{path} was damaged and is removed; DVC makes it anew when it is needed")
        refused = []
        for out in filter(in_work_tree, lost(repo)):
            if put_back(out):
                print(f"{out} was in no cache and is put back into it, from the work tree")
            else:
                refused.append(out)
        refuse(repo, refused)


def check_cache() -> None:
    """See that all results are in the cache."""
    with Repo() as repo:
        refuse(repo, lost(repo))


def main() -> None:
    """Mend the checkout that is the working folder."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="see that DVC has cached all results")
    if parser.parse_args().check:
        check_cache()
        return
    require_plain(Path())
    for name in mend(Path()):
        print(f"{name} was torn by a DVC that was killed; it is now {name}.torn, and DVC makes it anew")
    try:
        mend_cache()
    except (DvcException, OSError) as error:  # dvc repro says what else is wrong
        print(f"DVC's cache was not looked at: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
