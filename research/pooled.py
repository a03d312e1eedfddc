"""Runs of several seeds, pooled: BlockDrop beside each network that all of them have.

`python -m research.pooled FOLDER ...` reads working trees in which `dvc repro` has finished.

Shapes: S seeds, M test images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from pipeline.infra.errors import UserError
from pipeline.report.tables import markdown_table
from research.results import correctness_of
from research.tables import mean_and_std
from stages.support.common import read_json
from tools.command import Parser, command

BLOCKDROP = "blockdrop"


def pooled_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_]
) -> tuple[float, tuple[float, float]]:
    """Mean difference of accuracies over seeds and images, and its 95 % interval.

    All seeds see the same images, so an image counts once, with its mean difference over the seeds. The
    interval tells what other test images would change, with these S trained networks.

    Args:
        first, second: [S, M], whether a network is correct.
    """
    of_images = first.mean(axis=0) - second.mean(axis=0)  # [M]
    interval = ttest_1samp(of_images, 0).confidence_interval()
    return float(of_images.mean()), (float(interval.low), float(interval.high))


def flops_of(root: Path) -> dict[str, float]:
    """FLOPs per image by the name that `correctness_of` gives, as a fraction of the full ResNet's."""
    evaluated = read_json(root / "metrics/evaluate.json")
    curves = pd.read_csv(root / "plots/baseline/curves.csv").groupby("name")["flops"].first()
    flops = {BLOCKDROP: evaluated["flops_mean"], **curves}
    return {name: value / evaluated["full_flops"] for name, value in flops.items()}


def table_of(roots: Sequence[Path]) -> str:
    """A line for each network, as Markdown.

    Raises:
        UserError: a run is not finished, or was tested on other images.
    """
    try:
        runs = [correctness_of(root) for root in roots]
        flops = [flops_of(root) for root in roots]
        shuffled = [read_json(root / "metrics/evaluate.json")["shuffled_accuracy"] for root in roots]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; finish `dvc repro` there first") from None
    if len({len(run[BLOCKDROP]) for run in runs}) > 1:
        raise UserError("these runs have different numbers of test images; pool runs of one data set")
    names = [name for name in flops[0] if all(name in run for run in runs)]
    correct = {name: np.stack([run[name] for run in runs]) for name in names}  # [S, M] each
    rows = []
    for name in names:
        accuracies = correct[name].mean(axis=1)  # [S]
        mean, (low, high) = pooled_difference(correct[BLOCKDROP], correct[name])
        of_seeds = ", ".join(f"{100 * x:+.2f}" for x in correct[BLOCKDROP].mean(axis=1) - accuracies)
        rows.append(
            (
                name,
                mean_and_std(pd.Series(accuracies), percent=True),
                mean_and_std(pd.Series([of_run[name] for of_run in flops]), digits=1, percent=True),
                ""
                if name == BLOCKDROP
                else f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
                "" if name == BLOCKDROP else of_seeds,
            )
        )
    rows.insert(
        1, ("another image's policy", mean_and_std(pd.Series(shuffled), percent=True), "", "", "")
    )
    header = ("network", "accuracy", "FLOPs", "BlockDrop minus it, points (95 %)", "each seed")
    return markdown_table(header, rows)


def add_options(parser: Parser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    print(table_of(arguments.folders))


if __name__ == "__main__":
    main()
