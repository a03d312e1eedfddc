"""baseline: what BlockDrop must beat, on the test set. Nothing here depends on gamma.

The pretrained ResNet with every block, the same under the static rules with every number of blocks,
the pruned one if there is one, those that `static` finetuned, and the ResNets of other depths that
`sole` trained. Where the policy network classifies, each of the last two kinds also stands in an
ensemble with it: both run on every image.

Shapes: M test images, K blocks, D draws.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Params, flatten
from pipeline.data.dataset import load_split
from pipeline.data.split import ImageSplit
from pipeline.device import choose_device, describe_device, generator
from pipeline.flops import measure
from pipeline.inference.predict import Predictions, accuracies_of, correct_under, logits_under, predict
from pipeline.models import checkpoint
from pipeline.models.averaging import AveragedAnswers
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.resnet import ResNet
from pipeline.results import Baselines, FullResNet, SoleResNet, StaticNetwork
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
    """One network on the test images, M of them."""

    kind: str  # full, pruned, sole, the static rule, or ensemble
    depth: int
    blocks: int  # that run on an image
    finetuned: bool
    flops: float  # per image
    accuracy: float
    accuracy_std: float  # over draws; 0 where nothing is drawn
    correct: Tensor  # [M] bool; under the rule `random` in the first draw
    member: str = ""  # of an ensemble: the network beside the policy network

    @property
    def name(self) -> str:
        """In plots/baseline: full, pruned, sole-DEPTH, RULE-BLOCKS, or ensemble- and one of these."""
        of_kind = {"full": "", "pruned": "", "sole": f"-{self.depth}", "ensemble": f"-{self.member}"}
        return self.kind + of_kind.get(self.kind, f"-{self.blocks}")

    def row(self) -> dict[str, Any]:
        """Its line of plots/baseline/curves.csv."""
        row = {name: value for name, value in vars(self).items() if name not in ("correct", "member")}
        return {"name": self.name} | row | {"finetuned": int(self.finetuned)}


def random_draws(images: int) -> int:
    """How often the rule `random` is drawn on so many test images: 2 to 5 times."""
    return min(MOST_DRAWS, max(2, PREDICTIONS // images))


def with_every_block(kind: str, resnet: ResNet, test: ImageSplit, predictions: Predictions) -> Network:
    return Network(
        kind=kind,
        depth=resnet.depth,
        blocks=resnet.num_blocks,
        finetuned=False,
        flops=measure(resnet, None, test.image_size).every_block,
        accuracy=predictions.accuracy,
        accuracy_std=0.0,
        correct=predictions.correct,
    )


def under_rules(
    loaded: Checkpoint,
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
    resnet = loaded.need_resnet().to(test.device)
    cost = measure(resnet, None, test.image_size)  # no policy network decides
    rules = list(rules)
    policies_of = []  # for each rule [D, M, K], or [1, M, K] where all draws are the same
    for kind, num_kept in rules:
        draws = noise if kind == "random" else noise[:1]
        rule = static_rule(kind, num_kept, resnet.stages)
        policies_of.append(torch.stack([rule(table) for table in draws]))
    policies = torch.cat(policies_of)
    watched = steps.over(test, len(policies))
    correct = correct_under(resnet, watched, policies, normalisation=loaded.normalisation)
    correct_of = correct.split([len(policies) for policies in policies_of])  # [D or 1, M] each
    networks = []
    for (kind, num_kept), actions, outcomes in zip(rules, policies_of, correct_of, strict=True):
        accuracies = accuracies_of(outcomes)
        networks.append(
            Network(
                kind=kind,
                depth=resnet.depth,
                blocks=num_kept,
                finetuned=finetuned,
                flops=float(cost.of(actions.flatten(0, 1)).mean()),
                accuracy=mean(accuracies),  # exact, so that equal draws have a deviation of 0
                accuracy_std=stdev(accuracies) if len(accuracies) > 1 else 0.0,
                correct=outcomes[0],
            )
        )
    return networks


def trained_networks(params: Params, test: ImageSplit, noise: Tensor, steps: Steps) -> list[Network]:
    """The sole ResNets, then the finetuned static ones: those that params.yaml names, no others."""
    networks = []
    for depth in params.sole.depths:
        loaded = checkpoint.load(common.SOLE / str(depth))
        resnet = loaded.need_resnet().to(test.device)
        predictions = predict(resnet, steps.over(test), normalisation=loaded.normalisation)
        networks.append(with_every_block("sole", resnet, test, predictions))
    for rule, num_kept in product(params.static.rules, params.static.num_kept):
        loaded = checkpoint.load(common.STATIC / f"{rule}-{num_kept}")
        networks += under_rules(loaded, [(rule, num_kept)], test, noise, finetuned=True, steps=steps)
    return networks


def pruned_network(test: ImageSplit, steps: Steps) -> list[Network]:
    """The pruned ResNet with every block; nothing where prune passed pretrain's on."""
    loaded = checkpoint.load(common.PRUNED)
    resnet = loaded.need_resnet().to(test.device)
    if not resnet.is_pruned:
        return []
    steps.total(steps.amount + len(test))
    predictions = predict(resnet, steps.over(test), normalisation=loaded.normalisation)
    return [with_every_block("pruned", resnet, test, predictions)]


def ensembles(trained: list[Network], test: ImageSplit, steps: Steps) -> list[Network]:
    """Each trained network beside the policy network: both classify every image, answers averaged.

    BlockDrop's policy network classifies an image at its own cost, so a sceptic asks whether averaging
    does it, and not the choice. The average is calibrated on the validation images, as BlockDrop's is.
    Nothing where the policy network does not classify. RandomK is left out.
    """
    classifier = checkpoint.load(common.POLICY_PRETRAINED)
    if classifier.resnet is None:
        return []
    validation = load_split(common.PREPARED, "validation", test.device)
    members = [network for network in trained if network.kind != "random"]
    steps.total(steps.amount + len(members) * (len(validation) + len(test)))
    networks = []
    own_logits = [_logits(classifier, "full", 0, split) for split in (validation, test)]  # [M, N] each
    own_flops = measure(classifier.resnet, None, test.image_size).every_block
    for network in members:
        of_rule = network.kind in RULES
        loaded = checkpoint.load(
            common.STATIC / network.name if of_rule else common.SOLE / str(network.depth)
        )
        average = AveragedAnswers().to(test.device)
        logits = [
            _logits(loaded, network.kind, network.blocks, split)
            for split in (steps.over(validation), steps.over(test))
        ]  # [M, N] each
        average.fit(own_logits[0], logits[0][None], validation.labels)
        correct = (average(own_logits[1], logits[1]).argmax(dim=1) == test.labels).cpu()
        networks.append(
            replace(
                network,
                kind="ensemble",
                member=network.name,
                flops=network.flops + own_flops,
                accuracy=float(correct.double().mean()),
                correct=correct,
            )
        )
    return networks


def _logits(loaded: Checkpoint, kind: str, num_kept: int, split: ImageSplit) -> Tensor:
    """[M, N], of a checkpoint's ResNet with every block, or under a static rule."""
    resnet = loaded.need_resnet().to(split.device)
    policy = torch.ones(1, resnet.num_blocks, dtype=torch.bool)
    if kind in RULES:
        policy = static_rule(kind, num_kept, resnet.stages)(torch.zeros(policy.shape))
    return logits_under(resnet, split, policy.to(split.device), normalisation=loaded.normalisation)[0]


def metrics_of(full: Network, loss: float, trained: list[Network]) -> Baselines:
    """metrics/baseline.json: one section for each kind, under whose name DVC and MLflow show it."""
    pruned = next((network for network in trained if network.kind == "pruned"), None)
    return Baselines(
        baseline=FullResNet(accuracy=full.accuracy, loss=loss, flops=full.flops, num_blocks=full.blocks),
        sole={
            str(network.depth): SoleResNet(accuracy=network.accuracy, flops=network.flops)
            for network in trained
            if network.kind == "sole"
        },
        static={
            f"{network.kind}_{network.blocks}": StaticNetwork(
                accuracy=network.accuracy, flops=network.flops, blocks=network.blocks
            )
            for network in trained
            if network.kind in RULES
        },
        ensemble={
            network.member.replace("-", "_"): StaticNetwork(
                accuracy=network.accuracy, flops=network.flops, blocks=network.blocks
            )
            for network in trained
            if network.kind == "ensemble"
        },
        pruned={}
        if pruned is None
        else {"every_block": SoleResNet(accuracy=pruned.accuracy, flops=pruned.flops)},
    )


def flat(metrics: Baselines) -> dict[str, float]:
    """The metrics as MLflow takes them: those of the full ResNet as they are, others dotted."""
    sections = asdict(metrics)
    return dict(flatten(sections.pop("baseline") | sections))


def _passes(params: Params, resnet: ResNet, draws: int) -> int:
    """How often all test images are classified: once for each policy."""
    draws_of = {rule: draws if rule == "random" else 1 for rule in RULES}
    finetuned = sum(draws_of[rule] for rule in params.static.rules) * len(params.static.num_kept)
    plain = sum(draws_of.values()) * (resnet.num_blocks + 1)
    return 1 + len(params.sole.depths) + finetuned + plain


def write_tables(unfinetuned: list[Network], named: list[Network]) -> None:
    """plots/baseline: a row for each network, and a row for each image with who is correct on it."""
    networks = [*named, *unfinetuned]
    common.write_csv(common.PLOTS / "baseline" / "curves.csv", [n.row() for n in networks])
    correct = {network.name: network.correct.int().tolist() for network in named}
    rows = [
        {"image": image, **dict(zip(correct, values, strict=True))}
        for image, values in enumerate(zip(*correct.values(), strict=True))
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
        predictions = predict(resnet, steps.over(test), normalisation=pretrained.normalisation)
        seconds = time.monotonic() - started
        full = with_every_block("full", resnet, test, predictions)
        draw = generator(params.seed, "baseline")
        noise = torch.rand(draws, len(test), resnet.num_blocks, generator=draw)  # [D, M, K]
        rules = product(RULES, range(resnet.num_blocks + 1))
        unfinetuned = under_rules(pretrained, rules, test, noise, finetuned=False, steps=steps)
        trained = trained_networks(params, test, noise, steps)
        trained += ensembles(trained, test, steps) + pruned_network(test, steps)
        metrics = metrics_of(full, float(predictions.losses.double().mean()), trained)
        times = {
            "train_seconds": common.read_json(PRETRAIN_TIMES)["seconds"],
            "test_seconds": round(seconds, 3),
            "device": describe_device(device),
        }
        write_tables(unfinetuned, [full, *trained])
        common.write_json(common.METRICS / "baseline.json", asdict(metrics))
        common.write_json(common.METRICS / "times" / "baseline.json", times)
        mlflow_run.log_metrics({**flat(metrics), "test_seconds": seconds})
    accuracies = ", ".join(f"{network.name} {network.accuracy:.4f}" for network in trained)
    print(f"baseline: accuracy {full.accuracy:.4f} with every block, {accuracies}")


if __name__ == "__main__":
    common.run(main)
