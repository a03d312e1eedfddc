"""A copy of this repository in a folder of its own, in which tests run DVC."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

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
}


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # users write bytecode, and deps must not see it
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "BLOCKDROP_DEVICE": "cpu",
    }


class Copy:
    """A repository with a commit of its own, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=900,
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
    return re.findall(r"Running stage '(\w+)'", output)


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
        params = yaml.safe_load((ROOT / "presets/digits.yaml").read_text())
        for section, values in changes.items():
            params[section].update(values)
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    copy = Copy(folder)
    copy.run("git", "init", "-q", "-b", "main")
    copy.run("git", "config", "user.email", "test@example.org")
    copy.run("git", "config", "user.name", "test")
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-qm", "copy")
    return copy
