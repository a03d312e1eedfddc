"""A copy of this repository in another folder, in which tests run, fail and kill DVC."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ("dvc.lock", "metrics/", "plots/", "report/", "data/", "models/")  # not copied
OUTS = ("data/prepared", "models", "metrics", "plots", "report")
TIMED = {"times", "benchmark", "benchmark.json", "report"}  # parts of paths whose content is timed

# parameters with which the trainings take seconds
TINY: dict[str, dict[str, Any]] = {
    "data": {"image_size": 8},
    "resnet": {"depth": 14, "width": 4},
    "policy_net": {"width": 4},
    "pretrain": {"epochs": 2},
    "curriculum": {"epochs": 4},
    "finetune": {"epochs": 3},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {
        "batch_sizes": [4, 40],
        "executors": ["masked", "native"],
        "keep_ratios": [0.5, 1.0],
        "rounds": 5,
        "seconds": 60,
    },
    "sole": {"depths": [8]},
    "static": {"rules": ["first", "random", "distribute"], "num_kept": [3]},
}


def environment(*, tracking: bool = False) -> dict[str, str]:
    """The environment of commands in a copy; without MLflow, which takes seconds of every stage."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    for name in ("PYTHONDONTWRITEBYTECODE", "BLOCKDROP_TRACKING"):  # users' Pythons write bytecode
        variables.pop(name, None)
    if not tracking:
        variables["BLOCKDROP_TRACKING"] = "off"
    return variables | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "BLOCKDROP_DEVICE": "cpu",
    }


def changed(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The digits preset with changed values."""
    params = yaml.safe_load((ROOT / "presets/digits.yaml").read_text())
    for section, values in changes.items():
        params[section].update(values)
    return params


def make(folder: Path, *, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy the work tree without results, with changes to the digits preset, and commit it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, names):
        if not name.startswith(RESULTS) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if changes:
        (folder / "params.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
    user = ["-c", "user.email=test@example.org", "-c", "user.name=test"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], [*user, "commit", "-qm", "copy"]):
        subprocess.run(["git", *arguments], cwd=folder, env=environment(), check=True)


def digests(folder: Path, *, timed: bool = False) -> dict[str, str]:
    """Digests of the stages' results, by path; `timed`: also of those that depend on time."""
    digest_of = {}
    for top in OUTS:
        for path in sorted((folder / top).rglob("*")):
            if not path.is_file() or path.name == ".gitignore":
                continue
            if timed or not TIMED & set(path.relative_to(folder).parts):
                name = path.relative_to(folder).as_posix()
                digest_of[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest_of
