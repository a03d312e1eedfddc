"""What each part of a recipe is worth: short trainings with one part changed, several seeds each.

`python -m tools.ablation finetune --vary finetune.distillation=0 --vary finetune.diversity_weight=0`
trains the preset's stage as it is and with each change, on the first so many training images, from the
checkpoints in pretrained/, and asks the validation images. One row a training in
results/ablation_STAGE.csv, written as it finishes; what is there is not trained again. Needs
data/prepared (`make preset NAME=cifar10_resnet32_quick`, `dvc repro prepare`).

It uses the stages' own learners, and no DVC, MLflow or test image.
"""

import argparse
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pydantic import ValidationError

from pipeline import checkpoint
from pipeline import params as params_file
from pipeline import policy_gradient as pg
from pipeline.cost import measure
from pipeline.data import load_split
from pipeline.errors import UserError
from pipeline.evaluation import shuffled_accuracy
from pipeline.files import write_text
from pipeline.inference import predict, predict_policy
from pipeline.params import Loader, Params
from pipeline.policies import greedy_actions, policy_statistics
from pipeline.policy_learning import PolicyLearning
from pipeline.resume import project_root
from pipeline.runtime import choose_device, generator, keep_freed_memory, seed_everything
from pipeline.tensors import Images, Split
from pipeline.training import Position, fit
from stages import common, curriculum, finetune, trainer

STAGES = ("curriculum", "finetune")
AS_IT_IS = "the preset as it is"
SHUFFLES = 5
KEY = ["variant", "seed", "images", "epochs"]  # rows that are the same in these are one
PERCENT = ("validation_accuracy", "another_images_policy", "flops")
COLUMNS = {
    "validation_accuracy": "validation accuracy",
    "blocks_mean": "blocks",
    "flops": "FLOPs, of all",
    "reward": "reward",
    "another_images_policy": "another image's policy",
    "effective_policies": "effective policies",
    "images_per_second": "images/s",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings of an ablation share."""

    stage: str
    resnet: Path
    policy_net: Path
    train: Split
    validation: Split


def changed(preset: Params, changes: Mapping[str, Any]) -> Params:
    """The preset with other values under dotted keys.

    Raises:
        UserError: there is no such key, or it does not take the value.
    """
    values = preset.model_dump()
    known = preset.flat()
    for key, value in changes.items():
        if key not in known:
            raise UserError(
                f"--vary {key}: there is no such parameter; presets/digits.yaml has them all"
            )
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--vary {', '.join(f'{k}={v}' for k, v in changes.items())}: {said}") from None


def parsed(text: str) -> dict[str, Any]:
    """`key=value`, or several with commas between, to values as params.yaml would have them.

    Raises:
        UserError: it is none.
    """
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(f"--vary {text}: write KEY=VALUE, as in finetune.distillation=0")
        found[key.strip()] = yaml.load(value, Loader)
    return found


def learner_of(setting: Setting, params: Params) -> PolicyLearning:
    """The stage's learner, from the checkpoints."""
    device = setting.train.device
    resnet = checkpoint.load(setting.resnet).need_resnet().to(device)
    seed_everything(params.seed, "ablation")
    if setting.stage == "curriculum":
        return curriculum.learner_of(params, resnet)
    policy_net = checkpoint.load(setting.policy_net).need_policy_net().to(device)
    return finetune.learner_of(params, resnet, policy_net)


def measured(setting: Setting, params: Params) -> dict[str, float]:
    """Train once, and what the validation images say of the policy as it is deployed."""
    learner = learner_of(setting, params)
    section = params.curriculum if setting.stage == "curriculum" else params.finetune
    started = time.monotonic()
    results = fit(
        learner,
        train=setting.train,
        validation=setting.validation,
        epochs=section.epochs,
        batch_size=section.batch_size,
        schedule=trainer.schedule_of(section),
        augmentation=trainer.augmentation_of(params),
        normalisation=learner.normalisation,
        key=(params.seed, "ablation"),
        position=Position(),
    )
    for _ in results:
        pass
    seconds = time.monotonic() - started
    return {
        **judged(learner, setting.validation, params),
        "images_per_second": len(setting.train) * section.epochs / seconds,
    }


def judged(learner: PolicyLearning, split: Split, params: Params) -> dict[str, float]:
    """Accuracy, cost and diversity of the greedy policy on a split, in fp32; Eq. 3's reward of it."""
    normalisation = learner.normalisation
    logits = predict_policy(learner.policy_net, split, normalisation=normalisation)
    actions = greedy_actions(torch.sigmoid(logits))
    found = predict(learner.resnet, split, actions, normalisation=normalisation)
    cost = measure(learner.resnet, learner.policy_net, split.image_size)
    shares = None if learner.block_shares is None else learner.block_shares.cpu()
    others = shuffled_accuracy(
        learner.resnet, split, actions, normalisation=normalisation, repeats=SHUFFLES,
        draw=generator(params.seed, "ablation"),
    )  # fmt: skip
    return {
        "validation_accuracy": found.accuracy,
        "flops": float(cost.of(actions).mean()) / cost.full,
        "reward": float(pg.reward(found.correct, actions, learner.rules.gamma, shares).mean()),
        "another_images_policy": others,
        **policy_statistics(actions),
    }


def first_images(split: Images, count: int) -> Split:
    """The first `count` images of a split that lies in memory, or all of them.

    Raises:
        UserError: they are streamed.
    """
    if not isinstance(split, Split):
        raise UserError(
            "data/prepared lists its images; an ablation takes a data set that fits into memory"
        )
    return Split(images=split.images[:count], labels=split.labels[:count])


def row_of(setting: Setting, variant: str, params: Params) -> dict[str, Any]:
    """Train a variant, and its row."""
    section = params.curriculum if setting.stage == "curriculum" else params.finetune
    known = {
        "variant": variant, "seed": params.seed, "images": len(setting.train), "epochs": section.epochs,
    }  # fmt: skip
    return known | measured(setting, params)


def rows_of(path: Path) -> pd.DataFrame:
    """What is there already."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)


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
            digits = 0 if name == "images_per_second" else 3 if name == "reward" else 2
            mean, std = scale * group[name].mean(), scale * group[name].std()
            spread = "" if len(group) == 1 else f" +- {std:.{digits}f}"
            cells.append(f"{mean:.{digits}f}{spread}{unit}")
        lines.append(f"| {variant} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(setting: Setting, variants: Mapping[str, Params], seeds: Sequence[int], out: Path) -> None:
    """Train what is missing, seed by seed, and write each row as it finishes."""
    for seed in seeds:
        for variant, params in variants.items():
            own = params.model_copy(update={"seed": seed})
            section = own.curriculum if setting.stage == "curriculum" else own.finetune
            wanted = (variant, seed, len(setting.train), section.epochs)
            if wanted in set(rows_of(out)[KEY].itertuples(index=False, name=None)):
                continue
            row = row_of(setting, variant, own)
            there = rows_of(out)  # read again: another process may have added to it
            rows = pd.concat([there, pd.DataFrame([row])]) if len(there) else pd.DataFrame([row])
            out.parent.mkdir(parents=True, exist_ok=True)
            text = io.StringIO()
            rows.to_csv(text, index=False)
            write_text(out, text.getvalue())
            print(f"{variant}, seed {seed}: {100 * row['validation_accuracy']:.2f} %", flush=True)


def main() -> None:
    """Train the variants that are asked for, and print the means over seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--preset", default="cifar10_resnet32_quick")
    parser.add_argument(
        "--set", default="", metavar="KEY=VALUE[,...]", help="for all, as finetune.epochs=6"
    )
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--resnet", type=Path, default=Path("pretrained/pretrain"))
    parser.add_argument("--policy-net", type=Path, default=Path("pretrained/curriculum"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    try:
        preset = params_file.load(project_root() / "presets" / f"{arguments.preset}.yaml")
        common_changes = parsed(arguments.set) if arguments.set else {}
        variants = {AS_IT_IS: changed(preset, common_changes)}
        for text in arguments.vary:
            variants[text] = changed(preset, common_changes | parsed(text))
        device = choose_device()
        setting = Setting(
            stage=arguments.stage,
            resnet=arguments.resnet,
            policy_net=arguments.policy_net,
            train=first_images(load_split(common.PREPARED, "train", device), arguments.images),
            validation=first_images(load_split(common.PREPARED, "validation", device), 10**9),
        )
        out = arguments.out or project_root() / "results" / f"ablation_{arguments.stage}.csv"
        run(setting, variants, arguments.seeds, out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    table = rows_of(out)
    table = table[table["seed"].isin(arguments.seeds) & table["variant"].isin(variants)]
    print(f"\nrows in {out}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
