"""Folders of their own in which tests run: DVC in a copy of this repository, or stages alone."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import sandbox
import yaml
from builders import make_split
from sandbox import ROOT, changed, environment
from sandbox import TINY as TINY  # tests take it from here

from pipeline.config import Params, load
from pipeline.data import dataset
from pipeline.inference import native
from pipeline.inference.base import UnavailableError


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
        return sandbox.digests(self.folder, timed=timed)

    def metrics(self, name: str) -> dict:
        return json.loads((self.folder / f"metrics/{name}.json").read_text())


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([\w@-]+)'", output)


def make_workplace(folder: Path, *, changes: dict[str, dict]) -> Params:
    """Prepared images of three classes and a params.yaml: all that a training needs, without DVC."""
    splits = {
        name: dataset.Arrays(images=split.images.numpy(), labels=split.labels.numpy().astype(np.int64))
        for name, split in (
            ("train", make_split(48)),
            ("validation", make_split(24, seed=1)),
            ("test", make_split(30, seed=2)),
        )
    }
    made = dataset.Dataset(source="digits", classes=("dark", "grey", "light"), splits=splits)
    dataset.save(made, folder / "data/prepared")
    (folder / "params.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
    (ROOT / ".native").mkdir(exist_ok=True)
    (folder / ".native").symlink_to(ROOT / ".native")  # what is compiled already serves here too
    return load(folder / "params.yaml")


def make_copy(folder: Path, *, changes: dict[str, dict]) -> Copy:
    """Commit what the work tree holds (results left out), with changes to the digits preset.

    Compiled code comes along: to compile it in each copy would take most of a tiny training's time.
    """
    sandbox.make(folder, changes=changes)
    with contextlib.suppress(UnavailableError):
        native.library("fp32")
    (folder / native.BUILDS).mkdir()
    for compiled in (ROOT / native.BUILDS).glob("*.so"):
        shutil.copyfile(compiled, folder / native.BUILDS / compiled.name)
    copy = Copy(folder)
    copy.run("git", "config", "user.email", "test@example.org")
    copy.run("git", "config", "user.name", "test")
    return copy
