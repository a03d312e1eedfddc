"""What identifies an experiment in MLflow: its name, the commit it started from, its parameters."""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline import config
from pipeline.infra.git import git

TEXT_LIMIT = 6000  # characters of a parameter or tag that MLflow takes
NAME_LIMIT = 250  # characters of a run's name; PostgreSQL refuses longer ones, SQLite takes them
MAX_CHANGES = 3  # changed parameters in the name of an experiment that DVC gives none
PRESETS = "presets"
DEFAULTS = f"{PRESETS}/digits.yaml"  # whole; the other presets hold what differs from it
# experiments that differ in these alone are of one preset, and are compared
SWEPT = frozenset({"gamma", "curriculum.gamma", "prune.ratio", "seed"})


def experiment_name(params: Mapping[str, str]) -> str:
    """DVC's name; under plain `dvc repro` preset, branch, commit and what was changed.

    Changed are the parameters that differ from the preset, or without one from the commit.
    """
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    branch = git("rev-parse", "--abbrev-ref", "HEAD") or "no-git"
    commit = git("rev-parse", "--short", "HEAD") or "no-commit"
    preset = preset_of(params, _here())
    if preset is None:
        return " ".join([f"{branch}-{commit}", *_changed_params(params)])
    return " ".join([preset[0], f"{branch}-{commit}", *preset[1]])


def local_preset(params: Mapping[str, str]) -> str:
    """The preset among this folder's that the parameters are of; empty where they are of none."""
    preset = preset_of(params, _here())
    return preset[0] if preset else ""


def preset_of(params: Mapping[str, str], files: AbstractFileSystem) -> tuple[str, list[str]] | None:
    """The preset that differs in the fewest swept parameters alone, and these as `key=value`.

    Args:
        files: the project's, at the commit that the parameters are of.
    """
    found = []
    defaults = _flat(_text_of(files, DEFAULTS))
    for path in map(str, files.glob(f"{PRESETS}/*.yaml")) if defaults else ():
        differing = _flat(_text_of(files, path))
        values = defaults | differing
        if not differing or values.keys() != params.keys():
            continue
        changed = sorted(key for key in values if values[key] != params[key])
        if SWEPT.issuperset(changed):
            name = path.rpartition("/")[2].removesuffix(".yaml")
            found.append((len(changed), name, [f"{key}={params[key]}" for key in changed]))
    return min(found)[1:] if found else None


def _here() -> AbstractFileSystem:
    # an absolute path: fsspec keeps instances by their arguments, and "." may be another folder by then
    return DirFileSystem(path=str(Path.cwd()), fs=LocalFileSystem())


def _text_of(files: AbstractFileSystem, path: str) -> str:
    try:
        return str(files.cat_file(path).decode())
    except (OSError, UnicodeDecodeError):
        return ""


def _flat(text: str) -> dict[str, str]:
    """The values of a file of parameters, which may be half written; empty where it can't be read."""
    try:
        return as_texts(dict(config.flatten(yaml.load(text, config.Loader) or {})))
    except (yaml.YAMLError, ValueError, AttributeError):
        return {}


def _changed_params(params: Mapping[str, str]) -> list[str]:
    """`key=value` of those that differ from the commit's params.yaml; the last item counts the rest."""
    before = _flat(git("show", "HEAD:./params.yaml"))
    if not before:
        return []
    changes = [f"{key}={text}" for key, text in params.items() if before.get(key) != text]
    rest = len(changes) - MAX_CHANGES
    return changes[:MAX_CHANGES] + ([f"and {rest} more"] if rest > 0 else [])


def run_name(name: str, suffix: str = "") -> str:
    """The name of an experiment's run, which every database takes; tags and key have the whole name."""
    length = NAME_LIMIT - len(suffix)
    return (name if len(name) <= length else f"{name[: length - 3]}...") + suffix


def baseline_commit() -> str:
    return os.environ.get("DVC_EXP_BASELINE_REV") or git("rev-parse", "HEAD")


def experiment_key(name: str, baseline: str, params: Mapping[str, str]) -> str:
    """Tells experiments apart: names repeat across baselines, and `dvc repro` gives none."""
    content = repr((baseline, name, sorted(params.items())))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def origin_tags() -> dict[str, str]:
    """Tags that say which code runs here, for which experiment."""
    commit = git("rev-parse", "HEAD")
    return {
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "git.commit": commit,
        "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        "mlflow.source.git.commit": commit,
    }


def as_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow keeps them; equal values give equal texts, whoever read them (2, 2.0)."""
    return {key: _as_text(value)[:TEXT_LIMIT] for key, value in params.items()}


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 1e15
        return str(int(value)) if whole else repr(float(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_text, value))}]"
    return str(value)
