"""Runs of several seeds, pooled: BlockDrop beside each network that all of them have.

`python -m research.pooled NAME ...` reads rows of results/, which `python -m research.results record`
writes after `dvc repro`.

Shapes: S seeds, M test images.
"""

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from pipeline.infra.errors import UserError
from pipeline.report.tables import markdown_table
from research.results import FOLDER, ROWS, Row, unpacked
from research.tables import mean_and_std
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


class Result(NamedTuple):
    """What one network gave in one run."""

    correct: NDArray[np.bool_]  # [M]
    flops: float  # a mean image's, as a fraction of the full ResNet's


def results_of(row: Row) -> dict[str, Result]:
    """Of BlockDrop and each rival, by name; without those of which the row has no single images."""
    networks = [(BLOCKDROP, row.correct, row.evaluate["flops_mean"])]
    networks += [(rival.name, rival.correct, rival.flops) for rival in row.rivals]
    return {
        name: Result(unpacked(correct, row.test_images), flops / row.evaluate["full_flops"])
        for name, correct, flops in networks
        if correct
    }


def table_of(runs: Mapping[str, Row]) -> str:
    """A line for each network that all runs have, as Markdown.

    Raises:
        UserError: runs were tested on different images, or a row is older than what is pooled.
    """
    results = [results_of(row) for row in runs.values()]
    for name, result in zip(runs, results, strict=True):
        if BLOCKDROP not in result:
            raise UserError(f"{name} is an older row, without single images; record it again")
    if len({(row.params["data.source"], row.test_images) for row in runs.values()}) > 1:
        raise UserError("these runs have different test images; pool runs of one data set")
    names = [name for name in results[0] if all(name in result for result in results)]
    correct = {name: np.stack([result[name].correct for result in results]) for name in names}  # [S, M]
    shuffled = [row.evaluate["shuffled_accuracy"] for row in runs.values()]
    rows = []
    for name in names:
        accuracies = correct[name].mean(axis=1)  # [S]
        flops = pd.Series([result[name].flops for result in results])
        mean, (low, high) = pooled_difference(correct[BLOCKDROP], correct[name])
        of_seeds = ", ".join(f"{100 * x:+.2f}" for x in correct[BLOCKDROP].mean(axis=1) - accuracies)
        rows.append(
            (
                name,
                mean_and_std(pd.Series(accuracies), percent=True),
                mean_and_std(flops, digits=1, percent=True),
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


def load(name: str) -> Row:
    """A row of results/.

    Raises:
        UserError: there is none of this name.
    """
    path = FOLDER / ROWS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(row.stem for row in path.parent.glob("*.json")))
        raise UserError(f"results has no row {name!r}, but {known}")
    return Row.load(path)


def add_options(parser: Parser) -> None:
    parser.add_argument("rows", nargs="+", metavar="NAME", help="a row of results/rows")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    print(table_of({name: load(name) for name in arguments.rows}))


if __name__ == "__main__":
    main()
