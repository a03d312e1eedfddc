"""BlockDrop beside every network that competes with it, as one table: where is it beneficial?

Shape: M test images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.architectures import num_blocks
from pipeline.report.paired import Difference, paired_difference
from pipeline.report.tables import markdown_table
from pipeline.results import Answer, Baselines, BenchmarkResult, Evaluation, Speedup

Correctness = Mapping[str, NDArray[np.bool_]]  # [M] of each network
RULES = {"first": "FirstK", "random": "RandomK", "distribute": "DistributeK"}
NBSP = "\N{NO-BREAK SPACE}"
SAME_COST = 0.02  # FLOPs that differ by less are equal
RESNET = ("pretrain", "prune")  # trainings of the ResNet in which BlockDrop and the rules drop blocks
LEARNING = ("policy_pretrain", "curriculum", "finetune")  # what BlockDrop trains on top of it


class Network(NamedTuple):
    """A published one; what is not known of it is None."""

    name: str
    accuracy: float
    blocks: float | None
    flops: float | None


# by data set and depth, of Wu et al. 2018; and, as what came after, of Verelst and Tuytelaars 2020
# (arXiv 1912.03203): skips pixels and not blocks, trained for 350 epochs at a budget of 0.7
PAPER: dict[tuple[str, int], tuple[Network, ...]] = {
    ("cifar10", 32): (Network("ResNet-32 with DynConv (CVPR 2020)", 0.9358, None, 1.11e8),),
    ("cifar10", 110): (
        Network("ResNet-110 in the paper", 0.932, 54.0, 5.1e8),
        Network("BlockDrop in the paper, gamma 10", 0.936, 16.93, 1.81e8),
        Network("the same before finetuning, gamma 1", 0.754, 20.10, None),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainingTimes:
    """What a training took; None where it was imported."""

    seconds: float | None
    images_per_second: float | None
    device: str = ""
    fewest_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the stages wrote."""

    params: Mapping[str, Any]  # every parameter, flat
    evaluated: Evaluation
    baselines: Baselines
    # whether each network is correct on each test image; BlockDrop's name is `blockdrop`, the full
    # network's `full`, then `sole-20`, `first-7`, `pruned` and so on
    correctness: Correctness
    blocks: NDArray[np.int64]  # [M], that BlockDrop ran
    times: Mapping[str, TrainingTimes]  # of every training, by stage
    benchmark: BenchmarkResult
    machine: Mapping[str, Any]  # this machine, to be told apart from the one that the benchmark ran on


class Baseline(NamedTuple):
    """A static network to compare with."""

    name: str
    key: str  # in `Results.correctness`
    accuracy: float
    blocks: float
    flops: float
    trainings: Sequence[str]  # the stages that made it


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """BlockDrop beside a static network: accuracy on the same images, FLOPs, and time of one image."""

    baseline: Baseline
    difference: Difference
    cost_ratio: float  # BlockDrop's FLOPs by the other's
    milliseconds: float | None = None  # the other's, for one image; None where it was not timed
    speedup: Speedup | None = None  # BlockDrop's over the other

    @property
    def cheaper_or_equal(self) -> bool:
        """Whether the other network takes no more FLOPs."""
        return self.cost_ratio >= 1 - SAME_COST

    @property
    def cost(self) -> int:
        """1 where BlockDrop costs less, -1 where it costs more, 0 where neither is known.

        By the time of one image; by FLOPs where that was not measured or is too noisy.
        """
        if self.speedup is not None and self.speedup.claim:
            ends = self.speedup.low, self.speedup.high
            return int(ends[0] > 1) - int(ends[1] < 1)
        return 0 if abs(self.cost_ratio - 1) <= SAME_COST else 1 if self.cost_ratio < 1 else -1

    @property
    def verdict(self) -> str:
        """Where BlockDrop is beneficial: in accuracy, in cost, in both, not, or at the other's price."""
        accuracy, cost = self.difference.sign, self.cost
        words = ("accuracies can't be told apart", "more accurate", "less accurate")[accuracy]
        words += f", {100 * self.cost_ratio:.0f} % of its FLOPs"
        if self.speedup is not None:
            words += f", one image: {self.speedup}"
        gains = [name for name, sign in (("accuracy", accuracy), ("cost", cost)) if sign > 0]
        losses = [name for name, sign in (("accuracy", accuracy), ("cost", cost)) if sign < 0]
        if gains and losses:
            return f"partly, in {gains[0]} and not in {losses[0]}: {words}"
        answer = f"yes, in {' and '.join(gains)}" if gains else "no"
        return f"**{answer}**: {words}"


# ---------------------------------------------------------------------------- what is compared


def static_networks(results: Results) -> list[Baseline]:
    """The full, sole and pruned ResNets, static rules with finetuning, ensembles with one of these."""
    family, depth = results.params["resnet.family"], results.params["resnet.depth"]
    full = results.baselines.baseline
    size: tuple[float, float] = (full.num_blocks, full.flops)
    networks = [Baseline(f"ResNet-{depth}, every block", "full", full.accuracy, *size, ["pretrain"])]
    for other, sole in sorted(results.baselines.sole.items(), key=lambda item: -int(item[0])):
        name, key, blocks = f"ResNet-{other}", f"sole-{other}", num_blocks(family, int(other))
        networks.append(Baseline(name, key, sole.accuracy, blocks, sole.flops, [key]))
    for pruned in results.baselines.pruned.values():
        size = (full.num_blocks, pruned.flops)
        networks.append(Baseline(f"pruned ResNet-{depth}", "pruned", pruned.accuracy, *size, RESNET))
    tuned = "finetuned" if results.params["finetune.epochs"] else "not finetuned"
    for key, static in results.baselines.static.items():
        rule, num_kept = key.rsplit("_", 1)
        name, key = f"{RULES[rule]}, {num_kept} blocks, {tuned}", f"{rule}-{num_kept}"
        size = (static.blocks, static.flops)
        networks.append(Baseline(name, key, static.accuracy, *size, [*RESNET, f"static-{key}"]))
    for member in list(networks):
        ensemble = results.baselines.ensemble.get(member.key.replace("-", "_"))
        if ensemble is not None:
            name, key = f"the policy network and {member.name}", f"ensemble-{member.key}"
            size = (ensemble.blocks, ensemble.flops)
            trainings = [*member.trainings, "policy_pretrain"]
            networks.append(Baseline(name, key, ensemble.accuracy, *size, trainings))
    return networks


def published(params: Mapping[str, Any]) -> Sequence[Network]:
    """What papers say for this data set and depth."""
    return PAPER.get((params["data.source"], params["resnet.depth"]), ())


def compare(results: Results) -> list[Comparison]:
    """BlockDrop beside every static network; the full ResNet is the first."""
    answer = of_one_image(results.benchmark)
    winner = answer.winner if answer else None
    comparisons = []
    for baseline in static_networks(results):
        milliseconds, speedup = None, None
        if winner and baseline.key == "full":
            milliseconds, speedup = winner.full_milliseconds, winner.speedup
        elif winner and baseline.name in winner.sole:
            beside = winner.sole[baseline.name]
            milliseconds, speedup = beside.milliseconds, beside.speedup
        correctness = results.correctness
        comparisons.append(
            Comparison(
                baseline=baseline,
                difference=paired_difference(correctness["blockdrop"], correctness[baseline.key]),
                cost_ratio=results.evaluated.flops_mean / baseline.flops,
                milliseconds=milliseconds,
                speedup=speedup,
            )
        )
    return comparisons


def of_one_image(benchmark: BenchmarkResult) -> Answer | None:
    """Batch 1, in the precision in which BlockDrop is fastest; None where nothing was timed."""
    answers = [answer for answer in benchmark.answers if answer.batch == 1 and answer.winner]
    return min(answers, key=lambda a: a.winner.milliseconds if a.winner else 0.0, default=None)


# ------------------------------------------------------------------------------------ the table


def comparison_table(results: Results, comparisons: Sequence[Comparison]) -> str:
    """A line for each network, BlockDrop after the full ResNet, what papers say at the end."""
    header = (
        "network", "is BlockDrop beneficial beside it?", "test accuracy", "BlockDrop minus it, points",
        "blocks per image", "FLOPs", f"training,{NBSP}s", f"one image,{NBSP}ms",
    )  # fmt: skip
    lines = [_line_of(comparison, results) for comparison in comparisons]
    lines.insert(1, _line_of_blockdrop(results))
    full = results.baselines.baseline.flops
    for network in published(results.params):
        blocks = "" if network.blocks is None else f"{network.blocks:.2f}"
        flops = "" if network.flops is None else _flops(network.flops, full)
        accuracy = f"{100 * network.accuracy:.2f}{NBSP}%"
        lines.append((network.name, "published, another recipe", accuracy, "", blocks, flops, "", ""))
    return markdown_table(header, lines)


def _line_of(comparison: Comparison, results: Results) -> tuple[str, ...]:
    baseline, difference = comparison.baseline, comparison.difference
    mean, low, high = (f"{100 * share:+.2f}" for share in difference[:3])
    alone = f"{difference.only_first} : {difference.only_second}"
    return (
        baseline.name,
        comparison.verdict,
        f"{100 * baseline.accuracy:.2f}{NBSP}%",
        f"{mean} {unbroken(f'({low} to {high})')} {unbroken(alone)}",
        f"{baseline.blocks:g}",
        _flops(baseline.flops, results.baselines.baseline.flops),
        training_time(baseline.trainings, results.times),
        "" if comparison.milliseconds is None else f"{comparison.milliseconds:.2f}",
    )


def _line_of_blockdrop(results: Results) -> tuple[str, ...]:
    evaluated, blocks = results.evaluated, results.blocks
    answer = of_one_image(results.benchmark)
    return (
        "**BlockDrop**",
        "",
        f"{100 * evaluated.accuracy:.2f}{NBSP}%",
        "",
        f"{evaluated.blocks_mean:.2f} {unbroken(f'({blocks.min()} to {blocks.max()})')}",
        _flops(evaluated.flops_mean, results.baselines.baseline.flops),
        training_time((*RESNET, *LEARNING), results.times),
        f"{answer.winner.milliseconds:.2f}" if answer and answer.winner else "",
    )


def _flops(flops: float, full: float) -> str:
    return f"{flops:.3g}, {100 * flops / full:.1f}{NBSP}%"


def training_time(stages: Sequence[str], times: Mapping[str, TrainingTimes]) -> str:
    """Seconds of the stages together, and each of them; no sum where one was imported."""
    seconds = [times[stage].seconds for stage in stages if stage in times]
    known = [took for took in seconds if took is not None]
    parts = " + ".join("imported" if took is None else f"{took:.0f}" for took in seconds)
    if not known:
        return "imported"
    if len(seconds) == 1 or len(known) < len(seconds):
        return parts
    return f"{sum(known):.0f} {unbroken(f'({parts})')}"


def unbroken(text: str) -> str:
    """The same on one line, where a browser would break it at a space."""
    return text.replace(" ", NBSP)
