"""The report's text, in Markdown, from what the stages measured. No I/O.

Figures' names stand for files beside the report.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.architectures import num_blocks
from pipeline.report.html import as_markdown, fence_of
from pipeline.report.paired import Difference, paired_difference
from pipeline.speedup import claim, in_words

Numbers = Mapping[str, Any]
Outcomes = Mapping[str, NDArray[np.bool_]]
Published = tuple[str, float, float | None, float | None]  # name, accuracy, blocks, FLOPs
MACHINE = ("device", "processor", "threads")  # what makes times comparable
LEARNING = ("curriculum", "finetune")  # what BlockDrop trains on top of a ResNet
RULES = {"first": "FirstK", "random": "RandomK", "distribute": "DistributeK"}
SAME_COST = 0.02  # costs that differ by less are equal
ONE_DRAW = "RandomK is compared in one draw of its blocks; the table has the mean of several."

# by data set and depth, of Wu et al. 2018; and, as what came after, of Verelst and Tuytelaars 2020
# (arXiv 1912.03203): skips pixels and not blocks, trained for 350 epochs at a budget of 0.7
PAPER: dict[tuple[str, int], tuple[Published, ...]] = {
    ("cifar10", 32): (("ResNet-32 with DynConv (CVPR 2020)", 0.9358, None, 1.11e8),),
    ("cifar10", 110): (
        ("ResNet-110 in the paper", 0.932, 54.0, 5.1e8),
        ("BlockDrop in the paper, gamma 10", 0.936, 16.93, 1.81e8),
        ("the same before finetuning, gamma 1", 0.754, 20.10, None),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the stages wrote.

    Attributes:
        params: every parameter, flat.
        evaluated: metrics of evaluate.
        baseline: metrics of baseline: baseline, sole by depth, static by rule_blocks.
        outcomes: [M] for each network, whether it is right on each test image; BlockDrop's is
            `blockdrop`, the full network's `full`, then `sole-20`, `first-7`, ...
        times: seconds, rate and device of every training, by stage.
        benchmark: tables of the benchmark.
        machine: this machine, to be told apart from the one that was measured.
    """

    params: Numbers
    evaluated: Numbers
    baseline: Numbers
    outcomes: Outcomes
    times: Mapping[str, Numbers]
    benchmark: Numbers
    machine: Numbers


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A static network to compare with: its name in words, in `Results.outcomes`, and its cost."""

    said: str
    name: str
    accuracy: float
    blocks: float
    flops: float


def page(results: Results) -> str:
    """The whole report."""
    sections = (
        _top(results),
        _rivals_section(results),
        _looking(results.evaluated),
        _who_runs_what(),
        timing(results.benchmark, results.machine),
        _training(results),
        _reproduction(results.params),
    )
    return "\n".join(line for section in sections for line in (*section, ""))


def rivals(results: Results) -> list[Rival]:
    """The static networks that were trained: sole ResNets, and static rules with finetuning."""
    found = []
    for depth, numbers in results.baseline.get("sole", {}).items():
        blocks = num_blocks(results.params.get("resnet.family", "cifar"), int(depth))
        found.append(_rival(f"ResNet-{depth}", f"sole-{depth}", numbers, blocks))
    tuned = "finetuned" if results.params.get("finetune.epochs", 1) else "not finetuned"
    for key, numbers in results.baseline.get("static", {}).items():
        rule, kept = key.rsplit("_", 1)
        said = f"{RULES.get(rule, rule)}, {kept} blocks, {tuned}"
        found.append(_rival(said, f"{rule}-{kept}", numbers, numbers["blocks"]))
    return found


def published(params: Numbers) -> Sequence[Published]:
    """What papers say for this data set and depth."""
    return PAPER.get((params["data.source"], params["resnet.depth"]), ())


def verdict(results: Results, rival: Rival) -> str:
    """BlockDrop beside a static network: accuracy on the same images, cost, and who is ahead."""
    difference = paired_difference(results.outcomes["blockdrop"], results.outcomes[rival.name])
    ratio = results.evaluated["flops_mean"] / rival.flops
    return (
        f"- {rival.said}: BlockDrop has {_points(difference)} at {100 * ratio:.0f} % of its FLOPs: "
        f"{_ahead(difference.sign, ratio)}."
    )


def _points(difference: Difference) -> str:
    """In points of accuracy, with the interval and the images that make it."""
    mean, low, high = (100 * value for value in difference[:3])
    return (
        f"{mean:+.2f} points ({low:+.2f} to {high:+.2f}; right alone on {difference.only_first} images, "
        f"the other on {difference.only_second})"
    )


def _ahead(sign: int, ratio: float) -> str:
    """In words, what a difference of accuracies that can be told or not and a ratio of costs come to."""
    cost = 0 if abs(ratio - 1) <= SAME_COST else 1 if ratio > 1 else -1
    costs = {-1: "cheaper", 0: "as dear", 1: "dearer"}[cost]
    if sign == 0:
        return f"their accuracies can't be told apart, and it is {costs}"
    accuracy = "more accurate" if sign > 0 else "less accurate"
    if sign == cost:
        return f"{accuracy}, but {costs}"
    return f"**{'ahead' if sign > 0 else 'behind'}**, {accuracy} and {costs}"


def timing(benchmark: Numbers, machine: Numbers) -> list[str]:
    """The benchmark's section: when BlockDrop is beneficial, in words and in a table."""
    measured = benchmark["machine"]
    lines = [
        "## Does it pay in time?",
        "",
        f"Measured on {measured['device']} ({measured['processor']}), against the full ResNet in its "
        "fastest form here, policy network and normalisation included.",
        "",
    ]
    if any(measured[k] != machine[k] for k in MACHINE):
        lines += [
            f"**Another machine than this one** ({machine['device']}, {machine['processor']}): these "
            "times come from DVC's cache. `make benchmark` measures here.",
            "",
        ]
    lines += [*(f"- {beneficial(answer)}" for answer in benchmark["answers"]), ""]
    if not benchmark["answers"]:
        lines += ["Nothing could be timed, so nothing is claimed.", ""]
    if any(row["kind"] == "blockdrop" for row in benchmark["times"]):
        lines += ["![Speed-up by batch size](speedups.png)", ""]
    if benchmark["sweep"]:
        lines += [
            "Kept shares are of synthetic policies, which run the policy network as a call of its own: "
            "at small batches that costs more than it does inside, so there the true share is higher.",
            "",
            "![Time by kept share of the blocks](break_evens.png)",
            "",
        ]
    answered = [answer for answer in benchmark["answers"] if "executor" in answer]
    if answered:
        lines += _table(
            ("batch", "precision", "executor", "ms", "images per second", "times as fast",
             "share of what FLOPs promise, in that precision", "best static form", "ms"),
            (_timing_row(answer) for answer in answered),
        )  # fmt: skip
    if benchmark["left_out"]:
        lines += ["", f"Left out here: {as_markdown(_left_out(benchmark['left_out']))}."]
    return lines


def _left_out(reasons: Mapping[str, str]) -> str:
    """What was not timed, together where the reason is one."""
    by_reason: dict[str, list[str]] = {}
    for what, why in reasons.items():
        by_reason.setdefault(why, []).append(what)
    return "; ".join(f"{', '.join(those)} ({why})" for why, those in by_reason.items())


def beneficial(answer: Numbers) -> str:
    """One answer of the benchmark in words."""
    where = f"Batch {answer['batch']}, {answer['precision']}"
    if "executor" not in answer:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed."
    if not claim(answer):
        return f"{where}: too noisy here to say (nothing is claimed)."
    if answer["speedup_low"] > 1:
        said = f"{where}: beneficial, {in_words(answer)}"
    elif answer["speedup_high"] < 1:
        said = f"{where}: **not** beneficial, {in_words(answer)}"
    else:
        said = f"{where}: no difference, {in_words(answer)}"
    if answer["static_precision"] != answer["precision"]:
        said += f" beside the full ResNet in {answer['static_precision']}"
    shares = [
        f"{100 * answer[f'break_even_{variant}']:.0f} % with {variant} different policies"
        for variant in ("few", "many")
        if answer.get(f"break_even_{variant}") is not None
    ]
    if shares:
        said += f"; it would be up to a kept share of {', '.join(shares)}"
    if answer["faster_than"]:
        said += f"; no slower than a full {answer['faster_than']}"
    return said + "."


def _top(results: Results) -> list[str]:
    params, own, full = results.params, results.evaluated, results.baseline["baseline"]
    rows: list[Published] = [
        ("ResNet, every block", full["accuracy"], full["num_blocks"], full["flops"]),
        ("**BlockDrop**", own["accuracy"], own["blocks_mean"], own["flops_mean"]),
        *((r.said, r.accuracy, r.blocks, r.flops) for r in rivals(results)),
        *published(params),
    ]
    difference = paired_difference(results.outcomes["blockdrop"], results.outcomes["full"])
    return [
        f"# BlockDrop on {params['data.source']}, ResNet-{params['resnet.depth']}, "
        f"gamma {params['gamma']:g}",
        "",
        *_table(
            ("network", "test accuracy", "blocks per image", "FLOPs per image", "of the full ResNet's"),
            (_network_row(*row, full=full["flops"]) for row in rows),
        ),
        "",
        f"BlockDrop {_saves(own['flops_saved'])}, its policy network counted, at "
        f"{100 * difference.mean:+.2f} points of accuracy (95 % interval {100 * difference.low:+.2f} to "
        f"{100 * difference.high:+.2f}, Newcombe's for pairs, "
        f"{len(results.outcomes['full'])} test images).",
        "",
        "![Accuracy against FLOPs](trade_off.png)",
    ]


def _saves(share: float) -> str:
    percent = f"{100 * abs(share):.1f} %"
    return f"saves {percent} of the FLOPs" if share >= 0 else f"takes {percent} more FLOPs"


def _rivals_section(results: Results) -> list[str]:
    found = rivals(results)
    return [
        "## When is BlockDrop beneficial in comparison to a sole ResNet?",
        "",
        "Each difference of accuracies is on the same test images, with Newcombe's 95 % interval for "
        "pairs; where fewer than ten images differ, McNemar's exact test has to agree with it. FLOPs "
        f"within {100 * SAME_COST:.0f} % count as equal. "
        "The sole ResNets were trained by the same recipe as the full one; the static rules were "
        "finetuned as long as BlockDrop and pay no policy network.",
        "",
        *(verdict(results, rival) for rival in found),
        *(["", ONE_DRAW] if any(rival.name.startswith("random-") for rival in found) else []),
        *_in_time(results, found),
    ]


def _in_time(results: Results, found: Sequence[Rival]) -> list[str]:
    """In time: the sole ResNets that were trained and timed."""
    lines = [
        f"- Batch {answer['batch']}, {answer['precision']}, beside a full {name}: {_faster(beside)}."
        for answer in results.benchmark["answers"]
        for name, beside in answer.get("sole", {}).items()
        if name in {rival.said for rival in found}
    ]
    return ["", "In time, by the benchmark below:", "", *lines] if lines else []


def _faster(beside: Numbers) -> str:
    return f"BlockDrop is {in_words(beside)}" if claim(beside) else in_words(beside)


def _looking(own: Numbers) -> list[str]:
    return [
        "## Does looking at the image pay?",
        "",
        f"- {own['unique_policies']:.0f} different policies, as diverse as "
        f"{own['effective_policies']:.1f} equally frequent ones; "
        f"{own['blocks_mean']:.2f} +- {own['blocks_std']:.2f} blocks per image.",
        f"- With another image's policy the accuracy is {100 * own['shuffled_accuracy']:.2f} % "
        f"instead of {100 * own['accuracy']:.2f} %.",
        "- The best single policy for all images at no more FLOPs, chosen on the validation images, "
        f"reaches {100 * own['best_single_policy_accuracy']:.2f} % with "
        f"{own['best_single_policy_blocks']:.0f} blocks.",
        f"- {_difficulty(own)}",
    ]


def _difficulty(own: Numbers) -> str:
    value = own["difficulty_spearman"]
    if value is None:
        return "Every image takes the same number of blocks, so effort can't follow difficulty."
    low, high = own["difficulty_spearman_low"], own["difficulty_spearman_high"]
    return (
        "Rank correlation of the full network's loss and the number of blocks: "
        f"{value:+.3f} (95 % interval {low:+.3f} to {high:+.3f})."
    )


def _who_runs_what() -> list[str]:
    return [
        "## Which blocks, which classes, which images",
        "",
        "![Which blocks run](policy.png)",
        "",
        "![The most frequent policies of each class](policies_by_class.png)",
        "",
        "![Easy and hard images](easy_and_hard.png)",
    ]


def _training(results: Results) -> list[str]:
    rows = []
    for stage, times in results.times.items():
        if times["seconds"] is None:
            rows.append((stage, "imported", "", ""))
        else:
            rate = f"{times['images_per_second']:.0f}"
            rows.append((stage, f"{times['seconds']:.0f}", rate, times["device"]))
    return [
        "## Training",
        "",
        "![Learning curves](learning_curves.png)",
        "",
        *_table(("stage", "seconds", "training images per second", "on"), rows),
        *_payback(results),
    ]


def _payback(results: Results) -> list[str]:
    """How many images it takes until the time saved is the time that learning the policy took."""
    extra = [results.times[stage]["seconds"] for stage in LEARNING]
    gains = [a for a in results.benchmark["answers"] if a.get("reliable") and a["speedup_low"] > 1]
    if None in extra or not gains:
        return []
    best = max(gains, key=lambda a: _saved_per_image(a))
    images = 1000 * sum(extra) / _saved_per_image(best)
    return [
        "",
        f"Learning the policy took {sum(extra):.0f} s on top of the ResNet. At batch {best['batch']}, "
        f"{best['precision']}, {1000 * _saved_per_image(best):.3g} microseconds are saved an image, so "
        f"that time is won back after {images:.2g} images (times may be of different machines).",
    ]


def _saved_per_image(answer: Numbers) -> float:
    """Milliseconds."""
    saved: float = (answer["static_milliseconds"] - answer["milliseconds"]) / answer["batch"]
    return saved


def _reproduction(params: Numbers) -> list[str]:
    text = yaml.safe_dump(dict(params), default_flow_style=None, sort_keys=False, width=100)
    fence = fence_of(text)
    return [
        "## How to reproduce it",
        "",
        "`make repro` with these parameters (`params.yaml`); the commit is on the experiment's run in "
        "MLflow (`make ui`), and `dvc exp show` lists what was run beside it.",
        "",
        f"{fence}yaml",
        *text.splitlines(),
        fence,
    ]


def _rival(said: str, name: str, numbers: Numbers, blocks: float) -> Rival:
    return Rival(
        said=said, name=name, accuracy=numbers["accuracy"], blocks=blocks, flops=numbers["flops"]
    )


def _network_row(
    name: str, accuracy: float, blocks: float | None, flops: float | None, *, full: float
) -> tuple[str, ...]:
    cost = ("", "") if flops is None else (f"{flops:.3g}", f"{100 * flops / full:.1f} %")
    return name, f"{100 * accuracy:.2f} %", "" if blocks is None else f"{blocks:.2f}", *cost


def _timing_row(answer: Numbers) -> tuple[str, ...]:
    rate = 1000 * answer["batch"] / answer["milliseconds"]
    low, high = f"{answer['speedup_low']:.2f}", f"{answer['speedup_high']:.2f}"
    claimed = {"number": f"{answer['speedup']:.2f} ({low} to {high})", "": "too noisy"}
    ideal, share = f"{answer['ideal']:.2f}", answer["share_of_ideal"]
    if answer["reliable"] and share is not None:
        ideal = f"{100 * share:.0f} % of {ideal}"
    return (
        str(answer["batch"]),
        answer["precision"],
        answer["executor"],
        f"{answer['milliseconds']:.2f}",
        f"{rate:,.0f}",
        claimed.get(claim(answer), f"{low} to {high}"),
        ideal,
        f"{answer['best_static']}, {answer['static_precision']}",
        f"{answer['static_milliseconds']:.2f}",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
