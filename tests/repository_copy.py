"""Folders of their own in which tests run: DVC in a copy of this repository, or stages alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from conftest import make_split

from pipeline import data
from pipeline.params import Params, load

ROOT = Path(__file__).parents[1]
TINY = {
    "data": {"image_size": 8},
    "resnet": {"depth": 14, "width": 4},
    "policy_net": {"width": 4},
    "pretrain": {"epochs": 2},
    "curriculum": {"epochs": 4},
    "finetune": {"epochs": 3},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {"batch_sizes": [4, 40], "rounds": 5, "seconds": 0.1},
    "sole": {"depths": [8]},
    "static": {"rules": ["first", "random", "distribute"], "kept": [3]},
}


def environment(*, tracking: bool = False) -> dict[str, str]:
    """What commands see. MLflow takes seconds of every stage, so it is on only where it is looked at."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # users write bytecode, and deps must not see it
    if not tracking:
        kept["BLOCKDROP_TRACKING"] = "off"
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "BLOCKDROP_DEVICE": "cpu",
    }


class Copy:
    """A repository with a commit of its own, in which commands run."""

    def __init__(self, folder: Path, *, tracking: bool = False) -> None:
        self.folder = folder
        self.tracking = tracking

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=environment(tracking=self.tracking), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout if check else f"exit {done.returncode}\n{done.stdout}"

    def python(self, code: str) -> str:
        return self.run(sys.executable, "-c", code)

    def outs(self, *, timed: bool = False) -> dict[str, str]:
        """Digests of what the stages write, without or with what depends on the clock."""
        found = {}
        for top in ("data/prepared", "models", "metrics", "plots", "report"):
            for path in sorted((self.folder / top).rglob("*")):
                clocked = {"times", "benchmark", "benchmark.json", "report"} & set(path.parts)
                if path.is_file() and (timed or not clocked) and path.name != ".gitignore":
                    name = path.relative_to(self.folder).as_posix()
                    found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def metrics(self, name: str) -> dict:
        return json.loads((self.folder / f"metrics/{name}.json").read_text())


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([\w@-]+)'", output)


def make_workplace(folder: Path, *, changes: dict[str, dict]) -> Params:
    """Prepared images of three classes and a params.yaml: all that a training needs, without DVC."""
    splits = {
        name: data.Arrays(images=split.images.numpy(), labels=split.labels.numpy().astype(np.int64))
        for name, split in (
            ("train", make_split(48)),
            ("validation", make_split(24, seed=1)),
            ("test", make_split(30, seed=2)),
        )
    }
    dataset = data.Dataset(source="digits", classes=("dark", "grey", "light"), splits=splits)
    data.save(dataset, folder / "data/prepared")
    (folder / "params.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
    (ROOT / ".native").mkdir(exist_ok=True)
    (folder / ".native").symlink_to(ROOT / ".native")  # what is compiled already serves here too
    return load(folder / "params.yaml")


def changed(changes: dict[str, dict]) -> dict:
    """The digits preset with other values."""
    params = yaml.safe_load((ROOT / "presets/digits.yaml").read_text())
    for section, values in changes.items():
        params[section].update(values)
    return params


def make_copy(folder: Path, *, changes: dict[str, dict]) -> Copy:
    """Commit what the work tree holds (results left out), with changes to the digits preset."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    made = ("dvc.lock", "metrics/", "plots/", "report/", "data/", "models/")
    for name in filter(None, listed):
        if not name.startswith(made) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if changes:
        (folder / "params.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
    copy = Copy(folder)
    copy.run("git", "init", "-q", "-b", "main")
    copy.run("git", "config", "user.email", "test@example.org")
    copy.run("git", "config", "user.name", "test")
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-qm", "copy")
    return copy
