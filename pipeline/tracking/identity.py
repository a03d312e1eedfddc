"""What identifies an experiment in MLflow: its name, the commit it started from, its parameters."""

import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline import config
from pipeline.infra.git import git

TEXT_LIMIT = 6000  # characters of a parameter or tag that MLflow takes
NAME_LIMIT = 250  # characters of a run's name; PostgreSQL refuses longer ones, SQLite takes them
MAX_CHANGES = 3  # changed parameters in the name of an experiment that DVC gives none


def experiment_name(params: Mapping[str, str]) -> str:
    """DVC's name; under plain `dvc repro` branch, commit and the parameters changed since the commit."""
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    branch = git("rev-parse", "--abbrev-ref", "HEAD") or "no-git"
    commit = git("rev-parse", "--short", "HEAD") or "no-commit"
    return " ".join([f"{branch}-{commit}", *_changed_params(params)])


def _changed_params(params: Mapping[str, str]) -> list[str]:
    """`key=value` of those that differ from the commit's params.yaml; the last item counts the rest."""
    try:
        committed = yaml.load(git("show", "HEAD:./params.yaml"), config.Loader) or {}
        before = as_texts(dict(config.flatten(committed)))
    except (yaml.YAMLError, ValueError, AttributeError):
        return []
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
