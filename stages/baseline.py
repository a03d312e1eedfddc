"""baseline: what BlockDrop must beat, on the test set. Nothing here depends on gamma.

The pretrained ResNet with every block, the same under the static rules with every number of blocks,
those that `static` finetuned, and the ResNets of other depths that `sole` trained.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.data.split import ImageSplit
from pipeline.device import choose_device, describe_device, generator
from pipeline.flops import measure
from pipeline.inference.predict import Predictions, accuracies_of, correct_under, predict
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.resnet import ResNet
from pipeline.static_policies import RULES, static_rule
from pipeline.tracking.runs import stage_run
from stages.support import common
from stages.support.progress import Steps

PRETRAIN_TIMES = common.METRICS / "times" / "pretrain.json"
# of every image's blocks under the rule `random`, over which accuracies are means: 2 at least, for their
# deviation, and more where test images are few, since each draw is a pass for every number of blocks
MOST_DRAWS, PREDICTIONS = 5, 10_000


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network on the test images, M of them.

    Attributes:
        kind: full, sole, or the static rule.
        blocks: that run on an image.
        flops: per image.
        accuracy_std: over draws; 0 where nothing is drawn.
        correct: [M] bool; under the rule `random` in the first draw.
    """

    kind: str
    depth: int
    blocks: int
    finetuned: bool
    flops: float
    accuracy: float
    accuracy_std: float
    correct: Tensor

    @property
    def name(self) -> str:
        """What it is called in plots/baseline/images.csv: full, sole-DEPTH or RULE-BLOCKS."""
        number = {"full": "", "sole": f"-{self.depth}"}.get(self.kind, f"-{self.blocks}")
        return self.kind + number

    def row(self) -> dict[str, Any]:
        """Its line of plots/baseline/curves.csv."""
        return {
            "kind": self.kind,
            "depth": self.depth,
            "blocks": self.blocks,
            "finetuned": int(self.finetuned),
            "flops": self.flops,
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
        }


def random_draws(images: int) -> int:
    """How often the rule `random` is drawn on so many test images: 2 to 5 times."""
    return min(MOST_DRAWS, max(2, PREDICTIONS // images))


def with_every_block(kind: str, resnet: ResNet, test: ImageSplit, found: Predictions) -> Network:
    """A ResNet all of whose blocks run."""
    return Network(
        kind=kind,
        depth=resnet.depth,
        blocks=resnet.num_blocks,
        finetuned=False,
        flops=measure(resnet, None, test.image_size).full,
        accuracy=found.accuracy,
        accuracy_std=0.0,
        correct=found.correct,
    )


def ruled(
    own: Checkpoint,
    rules: Iterable[tuple[str, int]],
    test: ImageSplit,
    noise: Tensor,
    *,
    finetuned: bool,
    steps: Steps,
) -> list[Network]:
    """A checkpoint's ResNet under static rules, each with how many blocks it keeps.

    Args:
        noise: [D, M, K], what each of D draws of the rule `random` comes from.
    """
    resnet = own.need_resnet().to(test.device)
    cost = measure(resnet, None, test.image_size)  # no policy network decides
    rules = list(rules)
    drawn = []
    for kind, kept in rules:
        draws = noise if kind == "random" else noise[:1]  # the others are the same in every draw
        rule = static_rule(kind, kept, resnet.stages)
        drawn.append(torch.stack([rule(table) for table in draws]))
    policies = torch.cat(drawn)
    watched = steps.over(test, len(policies))
    outcomes = correct_under(resnet, watched, policies, normalisation=own.normalisation)
    found = []
    for (kind, kept), actions, right in zip(
        rules, drawn, outcomes.split([len(actions) for actions in drawn]), strict=True
    ):
        accuracies = accuracies_of(right)
        found.append(
            Network(
                kind=kind,
                depth=resnet.depth,
                blocks=kept,
                finetuned=finetuned,
                flops=float(cost.of(actions.flatten(0, 1)).mean()),
                accuracy=mean(accuracies),  # exact, so that equal draws have a deviation of 0
                accuracy_std=stdev(accuracies) if len(accuracies) > 1 else 0.0,
                correct=right[0],
            )
        )
    return found


def trained_networks(params: Params, test: ImageSplit, noise: Tensor, steps: Steps) -> list[Network]:
    """The sole ResNets, then the finetuned static ones: those that params.yaml names, no others."""
    networks = []
    for depth in params.sole.depths:
        own = checkpoint.load(common.SOLE / str(depth))
        resnet = own.need_resnet().to(test.device)
        found = predict(resnet, steps.over(test), normalisation=own.normalisation)
        networks.append(with_every_block("sole", resnet, test, found))
    for rule, kept in product(params.static.rules, params.static.num_kept):
        own = checkpoint.load(common.STATIC / f"{rule}-{kept}")
        networks += ruled(own, [(rule, kept)], test, noise, finetuned=True, steps=steps)
    return networks


def metrics_of(full: Network, loss: float, trained: list[Network]) -> dict[str, dict[str, Any]]:
    """metrics/baseline.json: one section for each kind, under whose name DVC and MLflow show it."""
    sole, static = {}, {}
    for network in trained:
        told: dict[str, float] = {"accuracy": network.accuracy, "flops": network.flops}
        if network.kind == "sole":
            sole[str(network.depth)] = told
        else:
            static[f"{network.kind}_{network.blocks}"] = told | {"blocks": network.blocks}
    baseline = {
        "accuracy": full.accuracy,
        "loss": loss,
        "flops": full.flops,
        "num_blocks": full.blocks,
    }
    return {"baseline": baseline, "sole": sole, "static": static}


def flat(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The metrics as MLflow takes them: those of the full ResNet as they are, others dotted."""
    found = dict(metrics["baseline"])
    for kind in ("sole", "static"):
        for name, values in metrics[kind].items():
            found |= {f"{kind}.{name}.{key}": value for key, value in values.items()}
    return found


def _passes(params: Params, resnet: ResNet, draws: int) -> int:
    """How often all test images are classified: once for each policy."""
    draws_of = {rule: draws if rule == "random" else 1 for rule in RULES}
    finetuned = sum(draws_of[rule] for rule in params.static.rules) * len(params.static.num_kept)
    plain = sum(draws_of.values()) * (resnet.num_blocks + 1)
    return 1 + len(params.sole.depths) + finetuned + plain


def write_tables(unfinetuned: list[Network], named: list[Network]) -> None:
    """plots/baseline: a row for each network, and a row for each image with who is right on it."""
    networks = [*named, *unfinetuned]
    common.write_csv(common.PLOTS / "baseline" / "curves.csv", [n.row() for n in networks])
    right = {network.name: network.correct.int().tolist() for network in named}
    rows = [
        {"image": image, **dict(zip(right, values, strict=True))}
        for image, values in enumerate(zip(*right.values(), strict=True))
    ]
    common.write_csv(common.PLOTS / "baseline" / "images.csv", rows)


def main(params: Params) -> None:
    """Write metrics/baseline.json, plots/baseline, and what it took to train and to test."""
    with stage_run("baseline", params.flat()) as mlflow_run, Steps("baseline") as steps:
        device = choose_device()
        pretrained = checkpoint.load(common.PRETRAINED)
        resnet = pretrained.need_resnet().to(device)
        test = load_split(common.PREPARED, "test", device)
        draws = random_draws(len(test))
        steps.total(len(test) * _passes(params, resnet, draws))
        started = time.monotonic()
        found = predict(resnet, steps.over(test), normalisation=pretrained.normalisation)
        seconds = time.monotonic() - started
        full = with_every_block("full", resnet, test, found)
        draw = generator(params.seed, "baseline")
        noise = torch.rand(draws, len(test), resnet.num_blocks, generator=draw)
        rules = product(RULES, range(resnet.num_blocks + 1))
        unfinetuned = ruled(pretrained, rules, test, noise, finetuned=False, steps=steps)
        trained = trained_networks(params, test, noise, steps)
        metrics = metrics_of(full, float(found.losses.double().mean()), trained)
        times = {
            "train_seconds": common.read_json(PRETRAIN_TIMES)["seconds"],
            "test_seconds": round(seconds, 3),
            "device": describe_device(device),
        }
        write_tables(unfinetuned, [full, *trained])
        common.write_json(common.METRICS / "baseline.json", metrics)
        common.write_json(common.METRICS / "times" / "baseline.json", times)
        mlflow_run.log_metrics({**flat(metrics), "test_seconds": seconds})
    told = ", ".join(f"{network.name} {network.accuracy:.4f}" for network in trained)
    print(f"baseline: accuracy {full.accuracy:.4f} with every block, {told}")


if __name__ == "__main__":
    common.run(main)
