"""What a stage's result depends on, as it was when the stage began, and whether it is so still.

DVC 3.67 reads parameters and digests once the stage has ended, and records them with its outs, in
dvc.lock and in the run cache: what was edited meanwhile would stand there beside a result of what was
there before. So a stage ends with status 1 when anything that dvc.yaml lists for it has changed.

Parameters are compared by their values and files by their contents; large files by size, time and
inode. This module is imported first, and imports nothing that a result depends on.

Not noticed: an edit in the tenth of a second between the last comparison and DVC's reading, or while DVC
restores outs from its cache; and code or data that were edited and put back between two comparisons.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.untrusted import cut, read_bytes, shown

ROOT = Path(__file__).parents[1]
MAP = ROOT / "dvc.yaml"
PARAMS = Path("params.yaml")
CODE = ("pipeline/", "stages/")
READ_BYTES = 256 << 20  # files are read until so much was, which takes half a second; then looked at
MAX_SHOWN = 20  # lines of a message
PLACE = re.compile(r"\$\{([\w.]+)\}")  # in dvc.yaml, of a parameter


class ChangedError(UserError):
    """A stage's parameters, code or inputs were changed while it ran; the message names them."""


@dataclass(frozen=True)
class Stamp:
    """A file as it was: size, time and inode, and its digest where it was read."""

    status: tuple[int, int, int]
    digest: str | None

    @classmethod
    def of(cls, path: Path, *, read: bool) -> "Stamp | None":
        """The file as it is; None where there is none that this user may see."""
        try:
            found = path.stat()
            status = (found.st_size, found.st_mtime_ns, found.st_ino)
            return cls(status, _digest(path) if read and path.is_file() else None)
        except OSError:
            return None

    def still_fits(self, path: Path) -> bool:
        """Whether the file holds what it held."""
        now = Stamp.of(path, read=self.digest is not None and self.status != _status(path))
        return now is not None and (now.status == self.status or now.digest == self.digest is not None)


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What dvc.yaml lists for a stage.

    Attributes:
        params: params.yaml as it was.
        keys: the parameters that are listed; None: all.
        deps: files and folders, by what dvc.yaml calls them.
        files: those files, and those in the folders.
        outs: what the stage writes.
    """

    stage: str
    params: bytes
    keys: tuple[str, ...] | None
    deps: Mapping[str, Path]
    files: Mapping[str, Stamp]
    outs: tuple[Path, ...]

    @classmethod
    def of(cls, stage: str, *arguments: str) -> "Ingredients":
        """Those of a stage, as they are now.

        Args:
            arguments: those of the command, which name the item of a matrix.

        Raises:
            OSError, yaml.YAMLError, LookupError, TypeError: dvc.yaml or params.yaml can't be read.
        """
        entry = _entry(stage)
        deps = {name: ROOT / name for name in entry["deps"] if name.startswith(CODE)}
        files = dict(_stamps(deps))  # before anything else, since code is being imported
        params = PARAMS.read_bytes()
        items = {f"item.{key}": text for key, text in zip(entry.get("matrix", {}), arguments)}
        values = yaml.safe_load(params)

        def filled(text: str) -> str:
            return PLACE.sub(lambda found: items.get(found[1]) or _at(values, found[1]), text)

        inputs = {filled(name): Path(filled(name)) for name in entry["deps"] if name not in deps}
        listed = entry.get("params", [])
        outs = [*entry.get("outs", []), *(name for item in entry.get("metrics", []) for name in item)]
        return cls(
            stage=stage,
            params=params,
            keys=None if any(isinstance(key, dict) for key in listed) else tuple(listed),
            deps=deps | inputs,
            files=files | dict(_stamps(inputs)),
            outs=tuple(Path(filled(name)) for name in outs),
        )

    def changes(self) -> Iterator[str]:
        """A line for each parameter and file that is not as it was."""
        yield from self._changed_params()
        now = dict(_paths(self.deps))
        for name in sorted(self.files.keys() | now.keys()):
            try:
                if name not in self.files:
                    yield f"{name!r} is new"
                elif not self.files[name].still_fits(now[name]):
                    yield f"{name!r} was edited"
            except (KeyError, FileNotFoundError):
                yield f"{name!r} is gone"

    def _changed_params(self) -> Iterator[str]:
        from pipeline.params import Loader, flatten  # not above: it needs code that is compared

        try:
            params = PARAMS.read_bytes()
            if params == self.params:
                return
            then, now = (dict(flatten(yaml.load(text, Loader))) for text in (self.params, params))
        except Exception as error:  # whatever an editor has left half written
            yield f"{PARAMS} can't be read any more ({cut(error)})"
            return
        for key in sorted(then.keys() | now.keys()):
            listed = self.keys is None or any(f"{key}.".startswith(f"{own}.") for own in self.keys)
            if listed and then.get(key) != now.get(key):
                yield f"{key} was {shown(then.get(key))}, is {shown(now.get(key))}"

    def remove_outs(self) -> None:
        """Leave no result where DVC would take it (`dvc commit`, `dvc exp save`)."""
        for path in self.outs:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def code_of(stage: str) -> list[Path]:
    """The code on which a stage's result depends: dvc.yaml lists it, and a test holds it to that."""
    return [ROOT / name for name in _entry(stage)["deps"] if name.startswith(CODE)]


def require_unchanged() -> None:
    """See that what this stage's result depends on is as it was when this process began.

    Raises:
        ChangedError: it is not; where the stage had written its outs, they are removed.
    """
    if AT_START is None:
        return
    changes = list(AT_START.changes())
    if not changes:
        return
    AT_START.remove_outs()
    more = [f"and {len(changes) - MAX_SHOWN} more"] if len(changes) > MAX_SHOWN else []
    listing = "\n".join(f"  - {change}" for change in changes[:MAX_SHOWN] + more)
    raise ChangedError(
        f"{AT_START.stage}: what it depends on was changed while it ran, and DVC would record the "
        f"change beside a result of what was there before:\n{listing}\n"
        "put it back and repeat (a training then goes on from its resume point), or leave it and repeat "
        "(which makes the result of what is there now)"
    )


def _entry(stage: str) -> dict[str, Any]:
    return yaml.safe_load(MAP.read_text(encoding="utf-8"))["stages"][stage]


def _at(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return str(values)


def _paths(deps: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Every file that is listed or in a folder that is; what is in neither is missing."""
    for name, path in deps.items():
        if not path.is_dir():
            yield name, path
        for folder, _, files in os.walk(path):
            below = Path(folder).relative_to(path)
            # DVC writes .gitignore files itself
            yield from (
                ((Path(name) / below / file).as_posix(), Path(folder) / file)
                for file in files
                if file != ".gitignore"
            )


def _stamps(deps: Mapping[str, Path]) -> Iterator[tuple[str, Stamp]]:
    left = READ_BYTES
    for name, path in _paths(deps):
        try:
            left -= path.stat().st_size
            yield name, Stamp.of(path, read=left >= 0)
        except FileNotFoundError:  # DVC, or the stage, says that it is missing
            continue


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_this_process() -> Ingredients | None:
    """None where this is no stage (`python -m stages.NAME ...`), or one that will not get far."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if not module.startswith("stages."):
        return None
    try:
        return Ingredients.of(module.removeprefix("stages."), *words[words.index("-m") + 2 :])
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return None


AT_START = _of_this_process()
