"""The trade-off of several gammas as a figure and a table: `make front`, after `dvc exp run` of each.

It shows all finished experiments that differ from the newest one in gamma, ratio of pruning and seed
alone, as MLflow has them. Git ignores the files that it writes; `--out results/front.png` replaces the
figure of docs/results.md.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from pipeline.architectures import num_blocks
from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.report.trade_off import front
from pipeline.tracking.overview import Experiment, experiments, siblings
from stages.support.common import write_csv
from tools.command import Parser, command
from tools.sync import sync, usable_store

COLUMNS = {"accuracy": "accuracy", "flops": "flops_mean", "blocks": "blocks_mean"}


def row_of(experiment: Experiment) -> dict[str, str | float]:
    """The experiment's point in the figure, a row of the table."""
    values = {name: experiment.metrics[metric] for name, metric in COLUMNS.items()}
    swept = {name: float(experiment.params[name]) for name in ("gamma", "seed")}
    pruned = float(experiment.params.get("prune.ratio", 0))
    return {"name": experiment.name, "pruned": pruned, **swept, **values}


def baselines_of(experiment: Experiment) -> list[dict[str, Any]]:
    """The full ResNet, the pruned one and those of other depths that the experiment measured."""
    metrics, params = experiment.metrics, experiment.params
    family: Any = params.get("resnet.family", "cifar")
    depth, blocks = int(params["resnet.depth"]), metrics["num_blocks"]

    def row(kind: str, depth: int, blocks: float, prefix: str) -> dict[str, Any]:
        sizes = {"kind": kind, "depth": depth, "blocks": blocks, "finetuned": 0}
        return sizes | {name: metrics[f"{prefix}{name}"] for name in ("flops", "accuracy")}

    rows = [row("full", depth, blocks, "full_")]
    if "pruned.every_block.flops" in metrics:
        ratio = float(params["prune.ratio"])
        rows.append(row("pruned", depth, blocks, "pruned.every_block.") | {"pruned": ratio})
    names = sorted(name for name in metrics if re.fullmatch(r"sole\.\d+\.accuracy", name))
    other_depths = [int(name.split(".")[1]) for name in names]
    return rows + [row("sole", d, num_blocks(family, d), f"sole.{d}.") for d in other_depths]


def choose(finished: list[Experiment], name: str | None) -> list[Experiment]:
    """The experiment of that name (without: the newest) and its siblings.

    Raises:
        UserError: there is none.
    """
    named = [experiment for experiment in finished if name in (None, experiment.name)]
    if not named:
        known = ", ".join(experiment.name for experiment in finished[:10]) or "none"
        problem = f"no finished experiment is named {name!r}" if name else "no experiment has finished"
        raise UserError(
            f"{problem}; there are: {known}; `make repro` or `dvc exp run -S gamma=5` runs one"
        )
    return siblings(named[0], finished)


def add_options(parser: Parser) -> None:
    parser.add_argument("--like", metavar="NAME", help="the experiment whose siblings are drawn")
    parser.add_argument("--out", type=Path, default=Path("results/own/front.png"))


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    with usable_store():
        sync(project_root())
        _, finished = experiments()
    chosen = choose(finished, arguments.like)
    rows = sorted(
        (row_of(experiment) for experiment in chosen),
        key=lambda row: (row["pruned"], row["gamma"], row["seed"], row["name"]),
    )
    params = chosen[0].params
    front(
        arguments.out,
        experiments=rows,
        baselines=[
            *baselines_of(chosen[0]),
            *(row for other in chosen[1:] for row in baselines_of(other) if row["kind"] == "pruned"),
        ],
        title=f"ResNet-{params['resnet.depth']} on {params['data.source']}, test images",
        images=int(chosen[0].metrics.get("data.test_images", 0)) or None,
    )
    table = arguments.out.with_suffix(".csv")
    write_csv(table, rows)
    print(f"{len(rows)} experiments: {arguments.out}, {table}")


if __name__ == "__main__":
    main()
