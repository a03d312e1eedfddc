"""What each part of a recipe is worth: short trainings with one part changed, several seeds each.

    python -m research.ablation finetune --vary finetune.distillation=0 --vary finetune_policy.lr=0.01

trains the preset's stage unchanged and with each change, on the first `--images` training images, from
the checkpoints in pretrained/, and evaluates on the validation images. It appends one row for each
training to results/ablation_STAGE.csv as soon as the training ends, and trains no row twice: start it
again after a kill, or start two processes to share the work. Needs data/prepared
(`make preset NAME=cifar10_resnet32_quick`, `dvc repro prepare`).

It trains with the stages' own learners, and uses no DVC, MLflow or test image.
"""

import argparse
import functools
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from pydantic import ValidationError

from pipeline import config as params_file
from pipeline.config import Curriculum, Finetune, Loader, Params
from pipeline.data.dataset import load_split
from pipeline.data.metadata import load_classes
from pipeline.data.split import ImageSplit, Split
from pipeline.device import choose_device, generator, keep_freed_memory, seed_everything
from pipeline.evaluation.metrics import shuffled_accuracy
from pipeline.flops import measure, rewarded_shares
from pipeline.inference.predict import predict, predict_policy
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from pipeline.infra.git import git
from pipeline.infra.locks import exclusive
from pipeline.infra.resume import digest_of_files, key_of, project_root
from pipeline.models import checkpoint
from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.policy import objectives as pg
from pipeline.policy.learner import PolicyLearner
from pipeline.report.tables import markdown_table
from pipeline.training.loop import NotFiniteError, Position, fit, require_finite
from research.tables import mean_and_std
from stages import curriculum, finetune
from stages.support import common, compatibility, recipes
from tools import preset as presets
from tools.command import Parser, command

READS = {  # the sections of params.yaml that a stage reads, beside the seed
    "curriculum": {"block_cost", "augmentation", "policy_net", "curriculum"},
    "finetune": {"gamma", "block_cost", "augmentation", "finetune", "finetune_policy"},
}
UNCHANGED = "the preset as it is"
SHUFFLES = 5
PERCENT = ("validation_accuracy", "another_images_policy", "flops")
DIGITS = {"seconds": 0, "reward": 3}  # of the others two
COLUMNS = {
    "validation_accuracy": "validation accuracy",
    "blocks_mean": "blocks",
    "flops": "FLOPs, of all",
    "reward": "reward",
    "another_images_policy": "another image's policy",
    "effective_policies": "effective policies",
    "seconds": "seconds",
}


class Key(NamedTuple):
    """Trainings with equal keys are one and the same."""

    variant: str
    seed: int
    recipe: str  # digest of all that the result depends on but seed, code and libraries


KEY = list(Key._fields)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a row comes from."""

    preset: str
    set: str  # the changes to the preset that all variants share
    commit: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The greedy policy on a split."""

    validation_accuracy: float
    flops: float  # of an image, as a fraction of the full ResNet's
    reward: float  # Eq. 3, the mean over images
    another_images_policy: float  # accuracy when each image takes another image's policy
    blocks_mean: float
    blocks_std: float
    unique_policies: float
    effective_policies: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings of an ablation share."""

    stage: str
    preset: Params  # with the changes for all variants; its gamma and cost of blocks score every variant
    provenance: Provenance
    resnet: Path
    policy_net: Path
    train: Split
    validation: Split


def parsed(text: str, *, flag: str) -> dict[str, Any]:
    """The values of `key=value,key=value`, each of the type that params.yaml would give it.

    Raises:
        UserError: the text is not of that form.
    """
    values = {}
    for part in re.split(r",(?=\s*[\w.]+=)", text) if text else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {part}: write KEY=VALUE, as in finetune.distillation=0")
        try:
            values[key.strip()] = yaml.load(value, Loader)
        except yaml.YAMLError:
            raise UserError(f"{flag} {part}: no value as params.yaml has them") from None
    return values


def changed(preset: Params, text: str, *, flag: str = "--vary") -> Params:
    """The preset with other values under dotted keys.

    Raises:
        UserError: a key does not exist, or does not take its value.
    """
    values = preset.model_dump()
    known = preset.flat()
    for key, value in parsed(text, flag=flag).items():
        if key not in known:
            raise UserError(f"{flag} {key}: there is no such parameter; params.yaml has them all")
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[name] = value
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{flag} {params_file.explain(error.errors()[0])}") from None


def variant_of(setting: Setting, text: str) -> Params:
    """The preset with one change that the stage reads.

    Raises:
        UserError: the stage does not read the changed value, or it was the same before.
    """
    params = changed(setting.preset, text)
    read = READS[setting.stage]
    if params.model_dump(include=read) == setting.preset.model_dump(include=read):
        names = ", ".join(sorted(read))
        raise UserError(f"--vary {text}: changes nothing that {setting.stage} reads; it reads {names}")
    return params


def checked(setting: Setting) -> Setting:
    """The setting, when its preset, data and checkpoints belong together.

    Raises:
        UserError: they do not.
    """
    preset = setting.preset
    compatibility.require_same(
        common.PREPARED, "image size", setting.train.image_size, preset.data.image_size,
        "make it by the same preset: `make preset`, `dvc repro prepare`",
    )  # fmt: skip
    classes = load_classes(common.PREPARED)
    compatibility.load_resnet(setting.resnet, preset, classes, depth=preset.resnet.depth)
    if setting.stage == "finetune":
        curriculum.load_policy_net(setting.policy_net, preset, checkpoint.load(setting.resnet))
    return setting


def key_of_row(setting: Setting, variant: str, params: Params) -> Key:
    """The key of the row that this training gives."""
    checkpoints = [setting.resnet, *([setting.policy_net] if setting.stage == "finetune" else [])]
    recipe = key_of(
        stage=setting.stage,
        networks=digest_of_files([folder / "model.json" for folder in checkpoints]),
        params=params.model_dump(include=READS[setting.stage]),
        judged_by=setting.preset.model_dump(include=READS[setting.stage]),
        images=len(setting.train),
    )
    return Key(variant=variant, seed=params.seed, recipe=recipe)


def learner_of(setting: Setting, params: Params) -> PolicyLearner:
    """The stage's learner, from the checkpoints."""
    device = setting.train.device
    start = checkpoint.load(setting.resnet)
    resnet = start.need_resnet().to(device)
    seed_everything(params.seed, "ablation")
    if setting.stage == "curriculum":
        policy_net = curriculum.policy_net_of(params, resnet, num_classes=len(start.classes)).to(device)
        learner = curriculum.learner_of(params, resnet, policy_net, start.normalisation)
    else:
        policy_net = checkpoint.load(setting.policy_net).need_policy_net().to(device)
        learner = finetune.learner_of(params, resnet, policy_net, start.normalisation)
    assert isinstance(learner, PolicyLearner)  # presets with paths have no recipe to vary
    return learner


def trained(setting: Setting, params: Params) -> PolicyLearner:
    """The learner after its epochs.

    Raises:
        NotFiniteError: its numbers went wrong.
    """
    learner = learner_of(setting, params)
    section: Curriculum | Finetune = getattr(params, setting.stage)
    position = Position()
    for result in fit(
        learner,
        train=setting.train,
        validation=setting.validation,
        epochs=section.epochs,
        batch_size=section.batch_size,
        schedule=recipes.schedule_of(section),
        augmentation=recipes.augmentation_of(params),
        normalisation=learner.normalisation,
        key=(params.seed, "ablation"),
        position=position,
    ):
        if result is not None:
            require_finite(learner, position, result)
    return learner


def scores_of(learner: PolicyLearner, split: Split, preset: Params, *, gamma: float) -> Scores:
    """Accuracy, cost, reward and diversity of the greedy policy, in fp32."""
    normalisation = learner.normalisation
    logits = predict_policy(learner.policy_net, split, normalisation=normalisation)
    actions = greedy_actions(torch.sigmoid(logits))
    predicted = predict(learner.resnet, split, actions, normalisation=normalisation)
    cost = measure(learner.resnet, learner.policy_net, split.image_size)
    shares = rewarded_shares(learner.resnet, split.image_size, preset.block_cost)
    shuffled = shuffled_accuracy(
        learner.resnet, split, actions, normalisation=normalisation, repeats=SHUFFLES,
        draw=generator(preset.seed, "ablation"),
    )  # fmt: skip
    block_shares = None if shares is None else torch.tensor(shares)
    rewards = pg.reward(predicted.correct, actions, gamma, block_shares)
    return Scores(
        validation_accuracy=predicted.accuracy,
        flops=float(cost.of(actions).mean()) / cost.full,
        reward=float(rewards.mean()),
        another_images_policy=shuffled,
        **policy_statistics(actions),
    )


def row_of(setting: Setting, variant: str, params: Params) -> dict[str, Any]:
    """Train a variant, and its row of the table.

    Raises:
        UserError: its numbers went wrong.
    """
    preset = setting.preset
    started = time.monotonic()
    try:
        learner = trained(setting, params)
    except NotFiniteError as error:
        raise UserError(f"{variant}, seed {params.seed}: {error}; lower a learning rate") from None
    seconds = time.monotonic() - started
    gamma = preset.curriculum.gamma if setting.stage == "curriculum" else preset.gamma
    return {
        **key_of_row(setting, variant, params)._asdict(),
        "images": len(setting.train),
        "epochs": getattr(params, setting.stage).epochs,
        **asdict(scores_of(learner, setting.validation, preset, gamma=gamma)),
        "seconds": round(seconds, 1),  # validation after each epoch included
        **asdict(setting.provenance),
    }


def rows_of(path: Path) -> pd.DataFrame:
    """The rows of a table; none where there is no file.

    Raises:
        UserError: the file is no such table.
    """
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    try:
        table = pd.read_csv(path, index_col=False, dtype={"recipe": str})
        missing = {*KEY, *COLUMNS} - set(table.columns)
        if missing:
            raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
        if table[[*KEY, *COLUMNS]].isna().any().any():
            raise ValueError("a row is not whole")
    except ValueError as error:  # as pandas' own are
        raise UserError(f"{path} is no table of ablations ({error}); mend or move it") from None
    return table


def summary(table: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds for each variant, as Markdown, the preset itself first."""
    rows = []
    for variant in sorted(table["variant"].unique(), key=lambda variant: variant != UNCHANGED):
        group = table[table["variant"] == variant]
        cells = [
            mean_and_std(group[name], digits=DIGITS.get(name, 2), percent=name in PERCENT)
            for name in COLUMNS
        ]
        rows.append([variant, len(group), *cells])
    return markdown_table(["", "n", *COLUMNS.values()], rows)


def run(
    setting: Setting, variants: Mapping[str, Params], seeds: Sequence[int], out: Path
) -> pd.DataFrame:
    """Train the rows that the table lacks, seed by seed; returns the rows of all variants and seeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    keys = set()
    for seed, (variant, preset) in itertools.product(seeds, variants.items()):
        params = preset.model_copy(update={"seed": seed})
        key = key_of_row(setting, variant, params)
        keys.add(key)
        if key not in keys_of(rows_of(out)):
            row = row_of(setting, variant, params)
            add_row(out, row)
            accuracy, blocks = 100 * row["validation_accuracy"], row["blocks_mean"]
            print(f"{variant}, seed {seed}: {accuracy:.2f} % with {blocks:.2f} blocks", flush=True)
    table = rows_of(out)
    return table[[key in keys for key in keys_of(table)]]


def keys_of(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(table[KEY].itertuples(index=False, name=None))


def add_row(out: Path, row: Mapping[str, Any]) -> None:
    """Append a row, unless another process has trained the same one meanwhile."""
    with exclusive(
        out.with_name(f".{out.name}.lock"), waiting_message=f"{out}: another ablation writes"
    ):
        rows = rows_of(out)
        if tuple(row[name] for name in KEY) in keys_of(rows):
            return
        new = pd.DataFrame([row])
        write_text(out, (pd.concat([rows, new]) if len(rows) else new).to_csv(index=False))


def in_memory(split: ImageSplit, count: int | None = None) -> Split:
    """The first `count` images of a split that lies in memory, or all of them.

    Raises:
        UserError: they are streamed.
    """
    if not isinstance(split, Split):
        raise UserError(f"{common.PREPARED} lists its images; take a data set that fits into memory")
    return Split(images=split.images[:count], labels=split.labels[:count])


def positive(text: str) -> int:
    """A positive number.

    Raises:
        ValueError: it is none.
    """
    if (number := int(text)) < 1:
        raise ValueError
    return number


def add_options(parser: Parser) -> None:
    root = project_root()
    parser.add_argument("stage", choices=list(READS))
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--preset", default="cifar10_resnet32_quick")
    parser.add_argument("--set", default="", metavar="KEY=VALUE[,...]", help="for all variants")
    parser.add_argument("--images", type=positive, default=15_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--resnet", type=Path, default=root / "pretrained/pretrain")
    parser.add_argument("--policy-net", type=Path, default=root / "pretrained/gates/curriculum")
    parser.add_argument("--out", type=Path)


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Train the variants, and print the means over seeds."""
    keep_freed_memory()
    out = arguments.out or project_root() / "results" / f"ablation_{arguments.stage}.csv"
    device = choose_device()
    preset = presets.load(arguments.preset, project_root() / "presets")
    setting = Setting(
        stage=arguments.stage,
        preset=changed(preset, arguments.set, flag="--set"),
        provenance=Provenance(
            preset=arguments.preset,
            set=arguments.set or "-",
            commit=git("rev-parse", "--short", "HEAD") or "-",
            torch=torch.__version__,
        ),
        resnet=arguments.resnet,
        policy_net=arguments.policy_net,
        train=in_memory(load_split(common.PREPARED, "train", device), arguments.images),
        validation=in_memory(load_split(common.PREPARED, "validation", device)),
    )
    variants = {UNCHANGED: setting.preset}
    variants |= {text: variant_of(setting, text) for text in arguments.vary}
    table = run(checked(setting), variants, arguments.seeds, out)
    print(f"\nrows in {out}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
