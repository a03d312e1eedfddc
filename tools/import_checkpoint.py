"""Start from a checkpoint: `make import FILE=path STAGE=pretrain|curriculum|finetune`.

Checks the file, copies it into import/, lets DVC track the copy, and names it in params.yaml.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import checkpoint, legacy
from pipeline.errors import UserError
from pipeline.params import NO_FILE

IMPORT = Path("import")
PARAMS = Path("params.yaml")
STAGES = ("pretrain", "curriculum", "finetune")


def check(path: Path, stage: str) -> None:
    """Open the checkpoint and see that it holds what the stage makes.

    Raises:
        UserError: it can't be read, or lacks a network.
    """
    if path.is_dir():
        own = checkpoint.load(path)
        if stage != "curriculum":
            own.need_resnet()
        if stage != "pretrain":
            own.need_policy_net()
    else:
        theirs = legacy.load(path)
        if stage != "curriculum":
            theirs.need_resnet(path)
        if stage != "pretrain":
            theirs.need_policy_net(path)


def bring_in(path: Path) -> Path:
    """Copy a legacy file, or both files of one of our own folders, into import/."""
    target = IMPORT / (f"{path.parent.name}-{path.name}" if path.is_dir() else path.name)
    if target.resolve() == path.resolve():
        return target
    if target.is_dir():
        shutil.rmtree(target)
    if path.is_dir():
        target.mkdir(parents=True)
        for name in (checkpoint.WEIGHTS, checkpoint.SIDECAR):
            shutil.copyfile(path / name, target / name)
    else:
        shutil.copyfile(path, target)
    return target


def name_in_params(stage: str, path: Path) -> list[str]:
    """Set STAGE.checkpoint in params.yaml, comments kept; the list names all that import it.

    A finetuned pair holds both networks, so the stages before it take them from the same file unless they
    have one of their own: otherwise they would train networks that nobody uses.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    content = yaml.load(PARAMS)
    named = [stage]
    if stage == "finetune":
        named += [s for s in STAGES[:2] if content[s]["checkpoint"] == NO_FILE]
    for name in named:
        content[name]["checkpoint"] = path.as_posix()
    yaml.dump(content, PARAMS)
    return named


def main() -> None:
    """Check, copy, track, name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("stage", choices=STAGES)
    arguments = parser.parse_args()
    path: Path = arguments.file
    if path.suffix == ".safetensors":  # one of our own folders, named by its weights
        path = path.parent
    try:
        check(path, arguments.stage)
    except UserError as error:
        sys.exit(f"error: {error}")
    target = bring_in(path)
    try:
        subprocess.run(["dvc", "add", "--quiet", str(target)], check=True)
        subprocess.run(["git", "add", f"{target}.dvc", str(IMPORT / ".gitignore")], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed; params.yaml is as it was")
    for stage in name_in_params(arguments.stage, target):
        print(f"{stage}.checkpoint in params.yaml is now {target}")
    print("run `dvc repro`")


if __name__ == "__main__":
    main()
