"""What each part of a recipe is worth: short trainings with one part changed, several seeds each.

`python -m tools.ablation finetune --vary finetune.distillation=0 --vary finetune_policy.marginal_entropy_coef=0`
trains the preset's stage as it is and with each change, on the first so many training images, from the
checkpoints in pretrained/, and asks the validation images. One row a training in
results/ablation_STAGE.csv, written as it finishes; what is there is not trained again, so that a killed
one goes on, and two at once share the work. Needs data/prepared
(`make preset NAME=cifar10_resnet32_quick`, `dvc repro prepare`).

It uses the stages' own learners, and no DVC, MLflow or test image.
"""

import io
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pipeline.training.loop import NotFiniteError, Position, fit, require_finite
from stages import curriculum, finetune
from stages.support import common, training
from tools.command import Parser, mendable

READ = {  # the parameters that a stage reads, beside the seed
    "curriculum": {"block_cost", "augmentation", "policy_net", "curriculum"},
    "finetune": {"gamma", "block_cost", "augmentation", "finetune"},
}
AS_IT_IS = "the preset as it is"
SHUFFLES = 5
KEY = ["variant", "seed", "recipe"]  # rows that are the same in these are one
PERCENT = ("validation_accuracy", "another_images_policy", "flops")
COLUMNS = {
    "validation_accuracy": "validation accuracy",
    "blocks_mean": "blocks",
    "flops": "FLOPs, of all",
    "reward": "reward",
    "another_images_policy": "another image's policy",
    "effective_policies": "effective policies",
    "seconds": "seconds",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings of an ablation share.

    Attributes:
        preset: with the changes that are for all; its gamma and cost of blocks judge every variant.
        told: as the rows say it: the preset's name, the changes for all.
    """

    stage: str
    preset: Params
    told: Mapping[str, str]
    resnet: Path
    policy_net: Path
    train: Split
    validation: Split


def section_of(stage: str, params: Params) -> Curriculum | Finetune:
    """The stage's own parameters."""
    return params.curriculum if stage == "curriculum" else params.finetune


def parsed(text: str, *, flag: str) -> dict[str, Any]:
    """`key=value`, or several with commas between, to values as params.yaml would have them.

    Raises:
        UserError: it is none.
    """
    found = {}
    for part in re.split(r",(?=\s*[\w.]+=)", text) if text else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {part}: write KEY=VALUE, as in finetune.distillation=0")
        try:
            found[key.strip()] = yaml.load(value, Loader)
        except yaml.YAMLError:
            raise UserError(f"{flag} {part}: no value as params.yaml has them") from None
    return found


def changed(preset: Params, text: str, *, flag: str = "--vary") -> Params:
    """The preset with other values under dotted keys.

    Raises:
        UserError: there is no such key, or it does not take the value.
    """
    values = preset.model_dump()
    known = preset.flat()
    for key, value in parsed(text, flag=flag).items():
        if key not in known:
            raise UserError(f"{flag} {key}: there is no such parameter; params.yaml has them all")
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{flag} {params_file.explain(error.errors()[0])}") from None


def variant_of(setting: Setting, text: str) -> Params:
    """The preset with one change that the stage reads.

    Raises:
        UserError: the stage does not read it, or the change is none.
    """
    params = changed(setting.preset, text)
    read = READ[setting.stage]
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
    training.require_same(
        common.PREPARED, "image size", setting.train.image_size, preset.data.image_size,
        "make it by the same preset: `make preset`, `dvc repro prepare`",
    )  # fmt: skip
    classes = load_classes(common.PREPARED)
    training.import_resnet(setting.resnet, preset, classes, depth=preset.resnet.depth)
    if setting.stage == "finetune":
        curriculum.import_policy_net(setting.policy_net, checkpoint.load(setting.resnet), preset)
    return setting


def key_values(setting: Setting, variant: str, params: Params) -> dict[str, Any]:
    """What a row is known by; `recipe` digests all that its result depends on but code and libraries."""
    used = [setting.resnet, *([setting.policy_net] if setting.stage == "finetune" else [])]
    recipe = key_of(
        stage=setting.stage,
        networks=digest_of_files([folder / "model.json" for folder in used]),
        params=params.model_dump(include=READ[setting.stage]),
        judged_by=setting.preset.model_dump(include=READ[setting.stage]),
        images=len(setting.train),
    )
    return {"variant": variant, "seed": params.seed, "recipe": recipe}


def learner_of(setting: Setting, params: Params) -> PolicyLearner:
    """The stage's learner, from the checkpoints."""
    device = setting.train.device
    start = checkpoint.load(setting.resnet)
    resnet = start.need_resnet().to(device)
    seed_everything(params.seed, "ablation")
    if setting.stage == "curriculum":
        return curriculum.learner_of(params, resnet, start.normalisation)
    policy_net = checkpoint.load(setting.policy_net).need_policy_net().to(device)
    return finetune.learner_of(params, resnet, policy_net, start.normalisation)


def trained(setting: Setting, params: Params) -> PolicyLearner:
    """The learner after its epochs.

    Raises:
        NotFiniteError: its numbers went wrong.
    """
    learner = learner_of(setting, params)
    section = section_of(setting.stage, params)
    position = Position()
    for result in fit(
        learner,
        train=setting.train,
        validation=setting.validation,
        epochs=section.epochs,
        batch_size=section.batch_size,
        schedule=training.schedule_of(section),
        augmentation=training.augmentation_of(params),
        normalisation=learner.normalisation,
        key=(params.seed, "ablation"),
        position=position,
    ):
        if result is not None:
            require_finite(learner, position, result)
    return learner


def judged(learner: PolicyLearner, split: Split, preset: Params, *, gamma: float) -> dict[str, float]:
    """Accuracy, cost and diversity of the greedy policy on a split, in fp32; Eq. 3's reward of it."""
    normalisation = learner.normalisation
    logits = predict_policy(learner.policy_net, split, normalisation=normalisation)
    actions = greedy_actions(torch.sigmoid(logits))
    found = predict(learner.resnet, split, actions, normalisation=normalisation)
    cost = measure(learner.resnet, learner.policy_net, split.image_size)
    shares = rewarded_shares(learner.resnet, split.image_size, preset.block_cost)
    others = shuffled_accuracy(
        learner.resnet, split, actions, normalisation=normalisation, repeats=SHUFFLES,
        draw=generator(preset.seed, "ablation"),
    )  # fmt: skip
    rewards = pg.reward(found.correct, actions, gamma, None if shares is None else torch.tensor(shares))
    return {
        "validation_accuracy": found.accuracy,
        "flops": float(cost.of(actions).mean()) / cost.full,
        "reward": float(rewards.mean()),
        "another_images_policy": others,
        **policy_statistics(actions),
    }


def row_of(setting: Setting, variant: str, params: Params) -> dict[str, Any]:
    """Train a variant, and its row.

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
        **key_values(setting, variant, params),
        "images": len(setting.train),
        "epochs": section_of(setting.stage, params).epochs,
        **judged(learner, setting.validation, preset, gamma=gamma),
        "seconds": round(seconds, 1),  # validation after each epoch included
        **setting.told,
    }


def rows_of(path: Path) -> pd.DataFrame:
    """What is there already.

    Raises:
        UserError: it is no such table.
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
    lines = [
        "| | n | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    variants = sorted(table["variant"].unique(), key=lambda variant: variant != AS_IT_IS)
    for variant in variants:
        group = table[table["variant"] == variant]
        cells = []
        for name in COLUMNS:
            scale, unit = (100, " %") if name in PERCENT else (1, "")
            digits = 0 if name == "seconds" else 3 if name == "reward" else 2
            mean, std = scale * group[name].mean(), scale * group[name].std()
            spread = "" if len(group) == 1 else f" +- {std:.{digits}f}"
            cells.append(f"{mean:.{digits}f}{spread}{unit}")
        lines.append(f"| {variant} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(
    setting: Setting, variants: Mapping[str, Params], seeds: Sequence[int], out: Path
) -> pd.DataFrame:
    """Train what is missing, seed by seed, writing each row as it finishes; the rows asked for."""
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = set()
    for seed in seeds:
        for variant, params in variants.items():
            own = params.model_copy(update={"seed": seed})
            key = tuple(key_values(setting, variant, own).values())
            wanted.add(key)
            if key not in keys_of(rows_of(out)):
                row = row_of(setting, variant, own)
                add_to(out, row)
                told = f"{100 * row['validation_accuracy']:.2f} % with {row['blocks_mean']:.2f} blocks"
                print(f"{variant}, seed {seed}: {told}", flush=True)
    table = rows_of(out)
    return table[[key in wanted for key in table[KEY].itertuples(index=False, name=None)]]


def keys_of(table: pd.DataFrame) -> set[tuple[Any, ...]]:
    """What its rows are known by."""
    return set(table[KEY].itertuples(index=False, name=None))


def add_to(out: Path, row: Mapping[str, Any]) -> None:
    """One more row, unless another process has trained it meanwhile."""
    with exclusive(out.with_name(f".{out.name}.lock"), waiting=f"{out}: another ablation writes"):
        there = rows_of(out)
        if tuple(row[name] for name in KEY) in keys_of(there):
            return
        new = pd.DataFrame([row])
        text = io.StringIO()
        (pd.concat([there, new]) if len(there) else new).to_csv(text, index=False)
        write_text(out, text.getvalue())


def in_memory(split: ImageSplit, count: int | None = None) -> Split:
    """The first `count` images of a split that lies in memory, or all of them.

    Raises:
        UserError: they are streamed.
    """
    if not isinstance(split, Split):
        raise UserError(f"{common.PREPARED} lists its images; take a data set that fits into memory")
    return Split(images=split.images[:count], labels=split.labels[:count])


def preset_of(name: str) -> Params:
    """A file of presets/.

    Raises:
        UserError: there is no such preset.
    """
    folder = project_root() / "presets"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"--preset {name}: there is no such preset; choose {', '.join(known)}")
    return params_file.load(folder / f"{name}.yaml")


def provenance(preset: str, changes: str) -> dict[str, str]:
    """What a row says of where it comes from."""
    commit = git("rev-parse", "--short", "HEAD")
    fields = {"preset": preset, "set": changes, "commit": commit, "torch": torch.__version__}
    return {name: value or "-" for name, value in fields.items()}


def positive(text: str) -> int:
    """A number of images.

    Raises:
        ValueError: it is none.
    """
    if (number := int(text)) < 1:
        raise ValueError
    return number


@mendable()
def main() -> None:
    """Train the variants that are asked for, and print the means over seeds."""
    parser = Parser(description=__doc__)
    parser.add_argument("stage", choices=list(READ))
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--preset", default="cifar10_resnet32_quick")
    parser.add_argument("--set", default="", metavar="KEY=VALUE[,...]", help="for all variants")
    parser.add_argument("--images", type=positive, default=15_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    root = project_root()
    parser.add_argument("--resnet", type=Path, default=root / "pretrained/pretrain")
    parser.add_argument("--policy-net", type=Path, default=root / "pretrained/curriculum")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    out = arguments.out or root / "results" / f"ablation_{arguments.stage}.csv"
    device = choose_device()
    setting = Setting(
        stage=arguments.stage,
        preset=changed(preset_of(arguments.preset), arguments.set, flag="--set"),
        told=provenance(arguments.preset, arguments.set),
        resnet=arguments.resnet,
        policy_net=arguments.policy_net,
        train=in_memory(load_split(common.PREPARED, "train", device), arguments.images),
        validation=in_memory(load_split(common.PREPARED, "validation", device)),
    )
    variants = {AS_IT_IS: setting.preset}
    variants |= {text: variant_of(setting, text) for text in arguments.vary}
    table = run(checked(setting), variants, arguments.seeds, out)
    print(f"\nrows in {out}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
