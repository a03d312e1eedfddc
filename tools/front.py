"""The trade-off of several gammas as a figure and a table: `make front`, after `dvc exp run` of each.

All finished experiments that differ from the newest one in gamma and seed alone, as MLflow has them.
What it writes is in no commit; `--out results/front.png` replaces the figure of the README.
"""

import csv
import io
from pathlib import Path
from typing import Any

from pipeline.architectures import num_blocks
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.report.trade_off import front
from pipeline.tracking.overview import Experiment, experiments, siblings
from tools.command import Parser, mendable
from tools.sync import sync, usable_store

COLUMNS = {"accuracy": "accuracy", "flops": "flops_mean", "blocks": "blocks_mean"}


def row_of(experiment: Experiment) -> dict[str, str | float]:
    """Its point in the figure."""
    values = {name: experiment.metrics[metric] for name, metric in COLUMNS.items()}
    swept = {name: float(experiment.params[name]) for name in ("gamma", "seed")}
    return {"name": experiment.name, **swept, **values}


def baselines_of(experiment: Experiment) -> list[dict[str, str | float]]:
    """The full and the sole ResNets that were measured beside it."""
    metrics = experiment.metrics
    depth = int(experiment.params["resnet.depth"])
    family: Any = experiment.params.get("resnet.family", "cifar")
    rows: list[dict[str, str | float]] = [
        {
            "kind": "full", "depth": depth, "blocks": metrics["num_blocks"], "finetuned": 0,
            "flops": metrics["full_flops"], "accuracy": metrics["full_accuracy"],
        }
    ]  # fmt: skip
    for name in sorted(name for name in metrics if name.startswith("sole.")):
        _, of, what = name.split(".")
        if what == "accuracy":
            rows.append(
                {
                    "kind": "sole", "depth": int(of), "blocks": num_blocks(family, int(of)),
                    "finetuned": 0, "flops": metrics[f"sole.{of}.flops"], "accuracy": metrics[name],
                }
            )  # fmt: skip
    return rows


def choose(found: list[Experiment], name: str | None) -> list[Experiment]:
    """The experiment of that name (without: the newest) and its siblings.

    Raises:
        UserError: there is none.
    """
    named = [experiment for experiment in found if name in (None, experiment.name)]
    if not named:
        known = ", ".join(experiment.name for experiment in found[:10]) or "none"
        wanted = f"no finished experiment is named {name!r}" if name else "no experiment has finished"
        raise UserError(
            f"{wanted}; there are: {known}; `make repro` or `dvc exp run -S gamma=5` runs one"
        )
    return siblings(named[0], found)


@mendable()
def main() -> None:
    """Write the figure and the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--like", metavar="NAME", help="the experiment whose siblings are drawn")
    parser.add_argument("--out", type=Path, default=Path("results/own/front.png"))
    arguments = parser.parse_args()
    with usable_store():
        sync(project_root())
        _, found = experiments()
    chosen = choose(found, arguments.like)
    rows = sorted((row_of(e) for e in chosen), key=lambda row: (row["gamma"], row["seed"], row["name"]))
    params = chosen[0].params
    front(
        arguments.out,
        experiments=rows,
        baselines=baselines_of(chosen[0]),
        title=f"ResNet-{params['resnet.depth']} on {params['data.source']}, test images",
    )
    table = arguments.out.with_suffix(".csv")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())
    print(f"{len(rows)} experiments: {arguments.out}, {table}")


if __name__ == "__main__":
    main()
