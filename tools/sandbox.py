"""A copy of this repository in a folder of its own, in which DVC may run, fail and be killed."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MADE = ("dvc.lock", "metrics/", "plots/", "report/", "data/", "models/")  # results, which are left out
OUTS = ("data/prepared", "models", "metrics", "plots", "report")
CLOCKED = {"times", "benchmark", "benchmark.json", "report"}  # parts of paths that depend on the clock

# trainings of seconds
TINY: dict[str, dict[str, Any]] = {
    "data": {"image_size": 8},
    "resnet": {"depth": 14, "width": 4},
    "policy_net": {"width": 4},
    "pretrain": {"epochs": 2},
    "curriculum": {"epochs": 4},
    "finetune": {"epochs": 3},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {"batch_sizes": [4, 40], "rounds": 5, "seconds": 60},
    "sole": {"depths": [8]},
    "static": {"rules": ["first", "random", "distribute"], "num_kept": [3]},
}


def environment(*, tracking: bool = False) -> dict[str, str]:
    """What commands see. MLflow takes seconds of every stage, so it is on only where it is looked at."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    for name in ("PYTHONDONTWRITEBYTECODE", "BLOCKDROP_TRACKING"):  # users write bytecode
        kept.pop(name, None)
    if not tracking:
        kept["BLOCKDROP_TRACKING"] = "off"
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "BLOCKDROP_DEVICE": "cpu",
    }


def changed(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The digits preset with other values."""
    params = yaml.safe_load((ROOT / "presets/digits.yaml").read_text())
    for section, values in changes.items():
        params[section].update(values)
    return params


def make(folder: Path, *, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Commit what the work tree holds (results left out), with changes to the digits preset."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, listed):
        if not name.startswith(MADE) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if changes:
        (folder / "params.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
    own = ["-c", "user.email=test@example.org", "-c", "user.name=test"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], [*own, "commit", "-qm", "copy"]):
        subprocess.run(["git", *words], cwd=folder, env=environment(), check=True)


def digests(folder: Path, *, timed: bool = False) -> dict[str, str]:
    """Digests of what the stages wrote, without or with what depends on the clock."""
    found = {}
    for top in OUTS:
        for path in sorted((folder / top).rglob("*")):
            if not path.is_file() or path.name == ".gitignore":
                continue
            if timed or not CLOCKED & set(path.relative_to(folder).parts):
                name = path.relative_to(folder).as_posix()
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
