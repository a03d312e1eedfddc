"""What the report says, from what the stages measured; its text is report.md.j2 beside this file.

Figures' names stand for files beside the report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.comparison import (
    LEARNING,
    RESNET,
    SAME_COST,
    Comparison,
    Results,
    compare,
    comparison_table,
)
from pipeline.report.html import as_code, as_markdown, fence_of
from pipeline.report.paired import Difference, paired_difference
from pipeline.report.tables import markdown_table
from pipeline.results import Answer, BenchmarkResult, Speedup

MACHINE = ("device", "processor", "threads")  # what makes times comparable
MAX_CHANGED = 3  # files that are named


@dataclass(frozen=True, kw_only=True)
class Origin:
    """When, from which code and for which experiment a report was written."""

    written: datetime  # UTC
    commit: str  # short; empty where there is no Git
    changed: Sequence[str]  # files that differ from the commit, from the project's folder
    experiment: str  # DVC's name; empty under `dvc repro`
    links: Mapping[str, str]  # MLflow's pages by title; none where nothing is tracked


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


def page(results: Results, origin: Origin) -> str:
    benchmark = results.benchmark
    comparisons = compare(results)
    full, *rivals = comparisons
    params_yaml = yaml.safe_dump(
        dict(results.params), default_flow_style=None, sort_keys=False, width=100
    )
    return _environment().get_template("report.md.j2").render(
        origin_line=_origin_line(origin),
        params=results.params,
        params_yaml=params_yaml,
        params_fence=fence_of(params_yaml),
        evaluated=results.evaluated,
        baselines=results.baselines,
        comparison_table=comparison_table(results, comparisons),
        beside_full=full.difference,
        pruning=_pruning_steps(results),
        blockdrop_trainings=[s for s in (*RESNET, *LEARNING) if s in results.times],
        test_images=len(results.blocks),
        same_cost=SAME_COST,
        strongest=max(
            (rival for rival in rivals if rival.cheaper_or_equal),
            key=lambda rival: rival.baseline.accuracy,
            default=None,
        ),
        random_is_compared=any(rival.baseline.key.startswith("random-") for rival in rivals),
        beside_sole_in_time=list(_beside_sole_in_time(benchmark, rivals)),
        benchmark=benchmark,
        machine=results.machine,
        on_another_machine=any(benchmark.machine[k] != results.machine[k] for k in MACHINE),
        blockdrop_was_timed=any(row.kind == "blockdrop" for row in benchmark.times),
        timing_table=_timing_table(benchmark.answers),
        left_out=benchmark.left_out,
        rates={name: took for name, took in results.times.items() if took.images_per_second},
        payback=_payback(results),
    )  # fmt: skip


class _PruningSteps(NamedTuple):
    """Changes in accuracy where blocks of a pruned ResNet are dropped, step by step."""

    alone: Difference  # the pruned ResNet with every block beside the full one
    dropping: Difference  # BlockDrop beside the pruned ResNet with every block


def _pruning_steps(results: Results) -> _PruningSteps | None:
    """None where nothing was pruned."""
    if not results.baselines.pruned:
        return None
    correct = results.correctness
    return _PruningSteps(
        alone=paired_difference(correct["pruned"], correct["full"]),
        dropping=paired_difference(correct["blockdrop"], correct["pruned"]),
    )


def _origin_line(origin: Origin) -> str:
    """Markdown: when, which experiment, which commit, where in MLflow."""
    commit = f"commit {as_code(origin.commit)}" if origin.commit else "no Git commit"
    if origin.changed:
        names = [as_code(name) for name in origin.changed[:MAX_CHANGED]]
        rest = len(origin.changed) - len(names)
        names += [f"and {rest} more"] if rest else []
        commit += f" with uncommitted changes ({', '.join(names)})"
    parts = [f"{origin.written:%Y-%m-%d %H:%M} UTC"]
    if origin.experiment:
        commit = f"experiment {as_code(origin.experiment)} from {commit}"
    parts.append(commit)
    if origin.links:
        pages = ", ".join(f"[{title}](<{address}>)" for title, address in origin.links.items())
        parts.append(f"MLflow (`make ui`): {pages}")
    return " · ".join(parts)


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
    ratios = (
        []
        if speedup.low > 1
        else [
            f"{100 * ratio:.0f} % with {variant} different policies"
            for variant, ratio in winner.break_evens.items()
        ]
    )
    if ratios:
        sentence += f"; it would be beneficial up to a keep ratio of {', '.join(ratios)}"
    if winner.faster_than:
        sentence += f"; no slower than a {winner.faster_than} with every block"
    return sentence + "."


def _beside_sole_in_time(
    benchmark: BenchmarkResult, rivals: Sequence[Comparison]
) -> Iterator[tuple[Answer, str, Speedup]]:
    """For each sole ResNet that was trained and timed the answer, its name, and the speed-up over it."""
    trained = {rival.baseline.name for rival in rivals}
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
