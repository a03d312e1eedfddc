"""What the report says, from what the stages measured; its text is report.md.j2 beside this file.

Figures' names stand for files beside the report. Shape: M test images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from pipeline.architectures import num_blocks
from pipeline.report.html import as_markdown, fence_of
from pipeline.report.paired import Difference, paired_difference
from pipeline.report.tables import markdown_table
from pipeline.results import Answer, Baselines, BenchmarkResult, Evaluation, Speedup

Correctness = Mapping[str, NDArray[np.bool_]]  # [M] of each network
MACHINE = ("device", "processor", "threads")  # what makes times comparable
LEARNING = ("policy_pretrain", "curriculum", "finetune")  # what BlockDrop trains on top of a ResNet
RULES = {"first": "FirstK", "random": "RandomK", "distribute": "DistributeK"}
SAME_COST = 0.02  # costs that differ by less are equal


class Network(NamedTuple):
    """A line of the first table; what is not known of a network is None."""

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
    times: Mapping[str, TrainingTimes]  # of every training, by stage
    benchmark: BenchmarkResult
    machine: Mapping[str, Any]  # this machine, to be told apart from the one that the benchmark ran on


class Baseline(NamedTuple):
    """A static network to compare with: its name, its key in `Results.correctness`, and its cost."""

    name: str
    key: str
    accuracy: float
    blocks: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class BesideBaseline:
    """BlockDrop beside a static network: accuracy on the same images, and its FLOPs by the other's."""

    name: str
    accuracy: float
    difference: Difference
    cost_ratio: float

    @property
    def cheaper_or_equal(self) -> bool:
        """Whether the other network takes no more FLOPs."""
        return self.cost_ratio >= 1 - SAME_COST

    @property
    def verdict(self) -> str:
        sign, ratio = self.difference.sign, self.cost_ratio
        cost = 0 if abs(ratio - 1) <= SAME_COST else 1 if ratio > 1 else -1
        costs = ("cheaper", "costs as much", "dearer")[cost + 1]
        if sign == 0:
            return f"their accuracies can't be told apart, and it {'is ' if cost else ''}{costs}"
        accuracy = "more accurate" if sign > 0 else "less accurate"
        if sign == cost:
            return f"{accuracy}, but {costs}"
        return f"**{'ahead' if sign > 0 else 'behind'}**, {accuracy} and {costs}"


@dataclass(frozen=True, kw_only=True)
class Payback:
    """After how many images the time that is saved is the time that learning the policy took."""

    seconds: float
    batch: int
    precision: str
    saved_microseconds: float  # an image

    @property
    def images(self) -> float:
        return 1e6 * self.seconds / self.saved_microseconds


# ------------------------------------------------------------------------------------ the page


def page(results: Results) -> str:
    benchmark, correctness = results.benchmark, results.correctness
    baselines = trained_baselines(results)
    rivals = [beside(results, baseline) for baseline in baselines]
    params_yaml = yaml.safe_dump(
        dict(results.params), default_flow_style=None, sort_keys=False, width=100
    )
    return _environment().get_template("report.md.j2").render(
        params=results.params,
        params_yaml=params_yaml,
        params_fence=fence_of(params_yaml),
        evaluated=results.evaluated,
        baselines=results.baselines,
        network_table=_network_table(results, baselines),
        beside_full=paired_difference(correctness["blockdrop"], correctness["full"]),
        test_images=len(correctness["full"]),
        same_cost=SAME_COST,
        beside_baselines=rivals,
        strongest=max(
            (rival for rival in rivals if rival.cheaper_or_equal),
            key=lambda rival: rival.accuracy,
            default=None,
        ),
        random_is_compared=any(baseline.key.startswith("random-") for baseline in baselines),
        beside_sole_in_time=list(_beside_sole_in_time(benchmark, baselines)),
        benchmark=benchmark,
        machine=results.machine,
        on_another_machine=any(benchmark.machine[k] != results.machine[k] for k in MACHINE),
        blockdrop_was_timed=any(row.kind == "blockdrop" for row in benchmark.times),
        timing_table=_timing_table(benchmark.answers),
        left_out=benchmark.left_out,
        training_table=_training_table(results.times),
        payback=_payback(results),
    )  # fmt: skip


def _environment() -> Environment:
    """Where the template finds its filters; nothing is escaped, since it is no HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f} %",
        "number": format,
        "text": as_markdown,
        "speed_verdict": speed_verdict,
    }
    return environment


# ----------------------------------------------------------------------------------- accuracy


def trained_baselines(results: Results) -> list[Baseline]:
    """Sole and pruned ResNets, static rules with finetuning, and ensembles with one of these."""
    family = results.params["resnet.family"]
    baselines = [
        Baseline(
            f"ResNet-{depth}", f"sole-{depth}", sole.accuracy, num_blocks(family, int(depth)), sole.flops
        )
        for depth, sole in results.baselines.sole.items()
    ]
    for pruned in results.baselines.pruned.values():
        depth, blocks = results.params["resnet.depth"], results.baselines.baseline.num_blocks
        name = f"pruned ResNet-{depth}"
        baselines.append(Baseline(name, "pruned", pruned.accuracy, blocks, pruned.flops))
    tuned = "finetuned" if results.params["finetune.epochs"] else "not finetuned"
    for key, static in results.baselines.static.items():
        rule, num_kept = key.rsplit("_", 1)
        name = f"{RULES[rule]}, {num_kept} blocks, {tuned}"
        baselines.append(
            Baseline(name, f"{rule}-{num_kept}", static.accuracy, static.blocks, static.flops)
        )
    for member in list(baselines):
        ensemble = results.baselines.ensemble.get(member.key.replace("-", "_"))
        if ensemble is not None:
            name, key = f"the policy network and {member.name}", f"ensemble-{member.key}"
            baselines.append(Baseline(name, key, ensemble.accuracy, ensemble.blocks, ensemble.flops))
    return baselines


def published(params: Mapping[str, Any]) -> Sequence[Network]:
    """What papers say for this data set and depth."""
    return PAPER.get((params["data.source"], params["resnet.depth"]), ())


def beside(results: Results, baseline: Baseline) -> BesideBaseline:
    correctness = results.correctness
    return BesideBaseline(
        name=baseline.name,
        accuracy=baseline.accuracy,
        difference=paired_difference(correctness["blockdrop"], correctness[baseline.key]),
        cost_ratio=results.evaluated.flops_mean / baseline.flops,
    )


def _network_table(results: Results, baselines: Sequence[Baseline]) -> str:
    evaluated, full = results.evaluated, results.baselines.baseline
    networks = [
        Network("ResNet, every block", full.accuracy, full.num_blocks, full.flops),
        Network("**BlockDrop**", evaluated.accuracy, evaluated.blocks_mean, evaluated.flops_mean),
        *(Network(name, *numbers) for name, _, *numbers in baselines),
        *published(results.params),
    ]
    return markdown_table(
        ("network", "test accuracy", "blocks per image", "FLOPs per image", "of the full ResNet's"),
        [
            (
                network.name,
                f"{100 * network.accuracy:.2f} %",
                "" if network.blocks is None else f"{network.blocks:.2f}",
                "" if network.flops is None else f"{network.flops:.3g}",
                "" if network.flops is None else f"{100 * network.flops / full.flops:.1f} %",
            )
            for network in networks
        ],
    )


# --------------------------------------------------------------------------------------- time


def speed_verdict(answer: Answer) -> str:
    """One answer of the benchmark in words: whether BlockDrop is beneficial."""
    where, winner = f"Batch {answer.batch}, {answer.precision}", answer.winner
    if winner is None:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed."
    speedup = winner.speedup
    if not speedup.claim:
        return f"{where}: too noisy here to say (nothing is claimed)."
    if speedup.low > 1:
        sentence = f"{where}: beneficial, {speedup}"
    elif speedup.high < 1:
        sentence = f"{where}: **not** beneficial, {speedup}"
    else:
        sentence = f"{where}: no difference, {speedup}"
    if answer.full_precision != answer.precision:
        sentence += f" beside the full ResNet in {answer.full_precision}"
    ratios = [
        f"{100 * ratio:.0f} % with {variant} different policies"
        for variant, ratio in winner.break_evens.items()
    ]
    if ratios:
        sentence += f"; it would be up to a keep ratio of {', '.join(ratios)}"
    if winner.faster_than:
        sentence += f"; no slower than a {winner.faster_than} with every block"
    return sentence + "."


def _beside_sole_in_time(
    benchmark: BenchmarkResult, baselines: Sequence[Baseline]
) -> Iterator[tuple[Answer, str, Speedup]]:
    """For each sole ResNet that was trained and timed the answer, its name, and the speed-up over it."""
    trained = {baseline.name for baseline in baselines}
    for answer in benchmark.answers:
        for name, sole in answer.winner.sole.items() if answer.winner else ():
            if name in trained:
                yield answer, name, sole.speedup


def _timing_table(answers: Sequence[Answer]) -> str:
    """A line for each answer that has a winner; empty where none has."""
    header = (
        "batch", "precision", "executor", "ms", "images per second", "times as fast",
        "share of what FLOPs promise, in that precision", "best full-ResNet form", "ms",
    )  # fmt: skip
    rows = []
    for answer, winner in ((answer, answer.winner) for answer in answers if answer.winner):
        speedup, ideal = winner.speedup, f"{winner.ideal:.2f}"
        interval = f"{speedup.low:.2f} to {speedup.high:.2f}"
        claimed = {"number": f"{speedup.ratio:.2f} ({interval})", "": "too noisy"}
        if speedup.reliable and winner.share_of_ideal is not None:
            ideal = f"{100 * winner.share_of_ideal:.0f} % of {ideal}"
        rows.append((
            str(answer.batch), answer.precision, winner.executor, f"{winner.milliseconds:.2f}",
            f"{1000 * answer.batch / winner.milliseconds:,.0f}", claimed.get(speedup.claim, interval),
            ideal, f"{answer.full_form}, {answer.full_precision}", f"{winner.full_milliseconds:.2f}",
        ))  # fmt: skip
    return markdown_table(header, rows) if rows else ""


# ----------------------------------------------------------------------------------- training


def _training_table(times: Mapping[str, TrainingTimes]) -> str:
    rows = []
    for stage, took in times.items():
        seconds = "imported" if took.seconds is None else f"{took.seconds:.0f}"
        rate = "" if took.images_per_second is None else f"{took.images_per_second:.0f}"
        rows.append((stage, seconds, rate, as_markdown(took.device)))
    return markdown_table(("stage", "seconds", "training images per second", "on"), rows)


def _payback(results: Results) -> Payback | None:
    """Where BlockDrop saves most; None where it was imported, or no speed-up may be claimed."""
    trained = [results.times[stage].seconds for stage in LEARNING if stage in results.times]
    seconds = [took for took in trained if took is not None]
    saved = {
        (answer.batch, answer.precision): 1000
        * (winner.full_milliseconds - winner.milliseconds)
        / answer.batch
        for answer in results.benchmark.answers
        if (winner := answer.winner) and winner.speedup.reliable and winner.speedup.low > 1
    }  # microseconds an image
    if len(seconds) < len(trained) or not saved:
        return None
    (batch, precision), most = max(saved.items(), key=lambda item: item[1])
    return Payback(seconds=sum(seconds), batch=batch, precision=precision, saved_microseconds=most)
