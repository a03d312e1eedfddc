"""Start from a checkpoint: `make import FILE=path STAGE=NAME`, NAME one of STAGES below.

FILE may be torchvision:IMAGENET1K_V1 (or _V2): pretrained weights, which it fetches.
Checks the file, copies it into import/, lets DVC track the copy, and names it in params.yaml.
"""

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import config
from pipeline.config import NO_FILE, ResNetParams
from pipeline.infra.atomic_io import write_atomically, write_text
from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import truncate
from pipeline.models import checkpoint
from pipeline.sources.cifar import download_timeout
from pipeline.training import legacy_checkpoints
from tools.command import Parser, command

IMPORT = Path("import")
PARAMS = Path("params.yaml")
TORCHVISION = "torchvision:"  # before the name of weights, in place of a file
OWN_FILES = (checkpoint.WEIGHTS, checkpoint.SIDECAR)
STAGES = ("pretrain", "prune", "policy_pretrain", "curriculum", "finetune")
WITH_POLICY = ("curriculum", "finetune")  # checkpoints that hold a policy network
UNSAFE = re.compile(r"[^\w.+=@,()-]")  # some mean something in dvc.yaml, DVC's targets or .gitignore


def check(path: Path, stage: str) -> None:
    """Check that the checkpoint can be read and holds the networks that the stage trains.

    Raises:
        UserError: it can't be read, or lacks a network.
    """
    if path.is_dir():
        loaded = checkpoint.load(path)
        if stage != "curriculum":
            loaded.need_resnet()
        if stage in WITH_POLICY:
            loaded.need_policy_net()
    else:
        legacy = legacy_checkpoints.load(path)
        if stage != "curriculum":
            legacy.need_resnet(path)
        if stage in WITH_POLICY:
            legacy.need_policy_net(path)


def bring_in(path: Path, in_use: Collection[Path] = ()) -> Path:
    """Copy a legacy file, or both files of one of our own folders, into import/.

    Raises:
        UserError: another stage uses an import of that name with other content.
    """
    path = path.resolve()
    if path.parent == IMPORT.resolve():
        return IMPORT / path.name
    name = f"{path.parent.name}-{path.name}" if path.is_dir() else path.name
    target = IMPORT / UNSAFE.sub("_", name)
    if target == Path(NO_FILE) or (target in in_use and not _same(path, target)):
        raise UserError(f"{target} is in use with other content; rename {path.name} and repeat")
    if path.is_dir():
        for name in OWN_FILES:  # the sidecar last, as it holds the digest of the weights
            write_atomically(target / name, (path / name).read_bytes())
    else:
        write_atomically(target, path.read_bytes())
    return target


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() != other.is_dir():
        return False
    pairs = [(one / n, other / n) for n in OWN_FILES] if one.is_dir() else [(one, other)]
    return all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def download(name: str, resnet: ResNetParams) -> Path:
    """Fetch torchvision's pretrained weights into import/, checked by the digest in the file's name.

    Raises:
        UserError: torchvision has no such weights, or they can't be fetched.
    """
    from torch.hub import download_url_to_file
    from torchvision.models import get_model_weights

    if resnet.family != "imagenet":
        raise UserError(f"torchvision has no ResNets of the family {resnet.family}; set resnet.family")
    try:
        urls = {weights.name: weights.url for weights in get_model_weights(f"resnet{resnet.depth}")}
    except ValueError:
        raise UserError(
            f"torchvision has no resnet{resnet.depth}; set resnet.depth to one it has"
        ) from None
    if name not in urls:
        raise UserError(
            f"resnet{resnet.depth} has no weights {truncate(name)}; choose {' or '.join(urls)}"
        )
    path = IMPORT / urls[name].rsplit("/", 1)[1]
    print(f"downloading {urls[name]} ...", flush=True)
    try:
        with download_timeout():
            prefix = path.stem.rsplit("-", 1)[1]  # the beginning of the file's SHA-256
            download_url_to_file(urls[name], str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # urllib's are OSErrors
        raise UserError(
            f"{urls[name]} can't be fetched ({truncate(error)}); fetch it on another machine and import "
            f"the file: `make import FILE={path.name} STAGE=pretrain`"
        ) from None
    return path


def name_in_params(stage: str, path: Path) -> list[str]:
    """Set checkpoints.STAGE in params.yaml, comments kept; returns all stages that now import `path`.

    A finetuned pair holds both networks, so the stages before it take them from the same file, unless
    params.yaml names another for them: otherwise they would train networks that no stage uses. Of a
    pruned pair that is prune, and pretrain trains the whole ResNet, with which results are compared.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    yaml.representer.add_representer(  # else ruamel.yaml writes nothing for null
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    content = yaml.load(PARAMS)
    checkpoints = content["checkpoints"]
    stages = [stage]
    if stage == "finetune":
        resnet = checkpoint.load(path).resnet if path.is_dir() else None
        held = ("prune" if resnet is not None and resnet.is_pruned else "pretrain", "curriculum")
        stages += [earlier for earlier in held if checkpoints[earlier] == NO_FILE]
    for name in stages:
        checkpoints[name] = path.as_posix()
    text = io.StringIO()
    yaml.dump(content, text)
    write_text(PARAMS, text.getvalue())
    return stages


def add_options(parser: Parser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("stage", choices=STAGES)


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    path: Path = arguments.file
    if path == Path():
        raise UserError("FILE is empty; `make import FILE=path STAGE=pretrain` names a checkpoint")
    if path.name in OWN_FILES:  # one of our own folders, named by a file in it
        path = path.resolve().parent
    try:
        params = config.load(PARAMS)  # first: it refuses a broken one
        others = [stage for stage in STAGES if stage != arguments.stage]
        in_use = {Path(getattr(params.checkpoints, stage)) for stage in others}
        if str(path).startswith(TORCHVISION):
            path = download(str(path).removeprefix(TORCHVISION), params.resnet)
        check(path, arguments.stage)
        target = bring_in(path, in_use)
        subprocess.run(["dvc", "add", "--quiet", str(target)], check=True)
        subprocess.run(["git", "add", f"{target}.dvc", str(IMPORT / ".gitignore")], check=True)
        stages = name_in_params(arguments.stage, target)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed; params.yaml is as it was")
    except OSError as error:
        sys.exit(
            f"error: {error.filename}: {error.strerror}; mend that and repeat (params.yaml is as it was)"
        )
    for stage in stages:
        print(f"checkpoints.{stage} in params.yaml is now {target}")
    print("run `make repro`")


if __name__ == "__main__":
    main()
