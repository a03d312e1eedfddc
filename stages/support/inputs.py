"""What dvc.yaml lists for a stage, and whether any of it has changed since the stage began.

DVC 3.67 reads parameters and hashes files after the stage has ended, and records them beside its outs,
in dvc.lock and in the run cache. It would record an edit made meanwhile beside a result of the values
before the edit. So a stage ends with status 1 when anything that dvc.yaml lists for it has changed.

Parameters are compared by value and files by content; once READ_BYTES are read, by size, time and inode.

Not noticed: an edit between this stage's last comparison and DVC's reading, a tenth of a second later.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.infra.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Params

ROOT = Path(__file__).parents[2]
PARAMS = Path("params.yaml")
CODE = ("pipeline/", "stages/")
IGNORED = (".gitignore", "*~", ".*.sw?", ".DS_Store")  # as in .dvcignore; DVC writes the first itself
READ_BYTES = 256 << 20  # of a stage's files, which takes half a second
MAX_SHOWN = 20  # lines of a message
VARIABLE = re.compile(r"\$\{([\w.]+)\}")  # in dvc.yaml: the value of a parameter


class ChangedError(UserError):
    """A stage's parameters, code or inputs were changed while it ran; the message names them."""


@dataclass(frozen=True)
class FileState:
    """Size, time and inode of a file, and the SHA-256 of its content where it was read."""

    status: tuple[int, int, int]
    digest: str | None

    @classmethod
    def of(cls, path: Path, *, read: bool) -> "FileState":
        """The state of the file now.

        Raises:
            OSError: it is missing or can't be read.
        """
        status = path.stat()
        digest = None
        if read and path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls((status.st_size, status.st_mtime_ns, status.st_ino), digest)

    def holds(self, path: Path) -> bool:
        """Whether the file still has this state, or at least its content."""
        now = FileState.of(path, read=False)
        if now.status == self.status:
            return True
        return self.digest is not None and FileState.of(path, read=True).digest == self.digest


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What dvc.yaml lists for a stage."""

    stage: str
    params: bytes  # of params.yaml
    keys: tuple[str, ...] | None  # the parameters that are listed; None: all
    deps: Mapping[str, Path]  # files and folders, by their names in dvc.yaml
    files: Mapping[str, FileState]  # the states of those files, and of the files in the folders
    outs: tuple[Path, ...]

    @classmethod
    def of(cls, stage: str, *arguments: str) -> "StageInputs":
        """What is listed for a stage, as it is now.

        Args:
            arguments: of the command line; they name the item of a matrix.

        Raises:
            OSError, yaml.YAMLError, LookupError, TypeError: dvc.yaml or params.yaml can't be read.
        """
        entry = _entry(stage)
        code = {name: ROOT / name for name in entry["deps"] if name.startswith(CODE)}
        files = dict(_states(code))  # first, since it is being imported
        params = PARAMS.read_bytes()
        values = yaml.safe_load(params)
        pairs = zip(entry.get("matrix", {}), arguments, strict=False)  # too few: the stage says so
        items = {f"item.{key}": text for key, text in pairs}

        def fill(text: str) -> str:
            return VARIABLE.sub(lambda match: items.get(match[1]) or _value(values, match[1]), text)

        inputs = {fill(name): Path(fill(name)) for name in entry["deps"] if name not in code}
        listed = entry.get("params", [])
        return cls(
            stage=stage,
            params=params,
            keys=None if any(isinstance(key, dict) for key in listed) else tuple(listed),
            deps=code | inputs,
            files=files | dict(_states(inputs)),
            outs=tuple(
                Path(fill(name)) for name in _names(entry.get("outs", []), entry.get("metrics", []))
            ),
        )

    def changes(self) -> Iterator[str]:
        """A line for each parameter and file that is not as it was."""
        yield from self._changed_params()
        paths = dict(_paths(self.deps))
        for name in sorted(self.files.keys() | paths.keys()):
            try:
                if name in self.files and not self.files[name].holds(paths[name]):
                    yield f"{name} was edited"
                elif name not in self.files and paths[name].exists():
                    yield f"{name} is new"
            except (KeyError, OSError):
                yield f"{name} is gone"

    def _changed_params(self) -> Iterator[str]:
        from pipeline.config import Loader, flatten  # here: after its own state was read

        try:
            params = PARAMS.read_bytes()
            if params == self.params:
                return
            before, now = (dict(flatten(yaml.load(text, Loader))) for text in (self.params, params))
        except Exception as error:  # whatever an editor has half written
            yield f"{PARAMS} can't be read any more ({type(error).__name__})"
            return
        for key in sorted(before.keys() | now.keys()):
            listed = self.keys is None or any(f"{key}.".startswith(f"{name}.") for name in self.keys)
            if listed and before.get(key) != now.get(key):
                yield f"{key} was {before.get(key)!r}, is {now.get(key)!r}"

    def remove_outs(self) -> None:
        """Remove the result, which `dvc commit` or `dvc exp save` would record."""
        for path in self.outs:
            if Path.cwd() not in path.absolute().parents:  # a mistake in dvc.yaml
                raise ValueError(f"{self.stage} has the out {path}, which is not below the project")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def code_of(stage: str) -> list[Path]:
    """The code that dvc.yaml lists for a stage; a test compares the list with the imports."""
    names = [name for name in _entry(stage)["deps"] if name.startswith(CODE)]
    return sorted(path for _, path in _paths({name: ROOT / name for name in names}))


def inputs_of(stage: str) -> list[Path]:
    """The data and the checkpoints of other stages that dvc.yaml lists for a stage."""
    return [Path(name) for name in _entry(stage)["deps"] if not name.startswith((*CODE, "$"))]


def params_of(stage: str, params: "Params") -> dict[str, Any]:
    """The values of the parameters that dvc.yaml lists for a stage, by their dotted keys."""
    listed = tuple(f"{name}." for name in _entry(stage)["params"])
    return {key: value for key, value in params.flat().items() if f"{key}.".startswith(listed)}


def require_unchanged() -> None:
    """See that this stage's parameters, code and inputs are as they were when its process began.

    Raises:
        ChangedError: they are not; its outs, if it has written any, are removed.
    """
    changes = [] if AT_START is None else list(AT_START.changes())
    if AT_START is None or not changes:
        return
    AT_START.remove_outs()
    more = [f"and {len(changes) - MAX_SHOWN} more"] if len(changes) > MAX_SHOWN else []
    listing = "\n".join(f"  - {change}" for change in changes[:MAX_SHOWN] + more)
    raise ChangedError(
        f"{AT_START.stage}: what its result depends on was changed while it ran, and DVC would record "
        f"the change beside a result of what was there before:\n{listing}\n"
        "Put it back and repeat: a training goes on from its resume point. Or repeat as it is: the "
        "stage then runs from its beginning."
    )


def _entry(stage: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]


def _names(*lists: list[Any]) -> Iterator[str]:
    """Paths of outs and metrics: an entry is a path, or a path with settings."""
    for entry in (entry for entries in lists for entry in entries):
        yield from [entry] if isinstance(entry, str) else entry


def _value(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return str(values)


def _paths(deps: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Every file that is listed, and every file in a listed folder."""
    for name, path in deps.items():
        if not path.is_dir():
            yield name, path
        for folder, folders, files in os.walk(path):
            folders[:] = [subfolder for subfolder in folders if subfolder != "__pycache__"]
            for file in files:
                if not any(fnmatch(file, pattern) for pattern in IGNORED):
                    full = Path(folder) / file
                    yield (Path(name) / full.relative_to(path)).as_posix(), full


def _states(deps: Mapping[str, Path]) -> Iterator[tuple[str, FileState]]:
    bytes_left = READ_BYTES
    for name, path in _paths(deps):
        try:
            bytes_left -= path.stat().st_size
            yield name, FileState.of(path, read=bytes_left >= 0)
        except FileNotFoundError:  # DVC or the stage says that it is missing
            continue


def _of_this_process() -> StageInputs | None:
    """None where this process is no `python -m stages.NAME ...`, or its files can't be read."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if not module.startswith("stages."):
        return None
    try:
        return StageInputs.of(module.removeprefix("stages."), *words[words.index("-m") + 2 :])
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return None


AT_START = _of_this_process()
