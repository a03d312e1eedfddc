"""The trade-off as means over seeds: a grid of DVC experiments, and a table of their results.

`python -m research.seeds --gammas 1 2 5 10 --seeds 0 1 2 3 4` on the current commit and params.yaml.
Stages that do not depend on gamma run once for each seed. Finished experiments are not repeated.
"""

import argparse
import io
import subprocess
import time
from pathlib import Path

import pandas as pd

from pipeline.infra.errors import UserError
from pipeline.report.tables import markdown_table
from research.tables import mean_and_std
from tools.command import Parser, command

POLL_SECONDS = 5
METRICS = {
    "accuracy": "test accuracy",
    "full_accuracy": "every block",
    "blocks_mean": "blocks",
    "flops_saved": "FLOPs saved",
    "effective_policies": "effective policies",
    "shuffled_accuracy": "another image's policy",
    "best_single_policy_accuracy": "best single policy",
}


def name_of(gamma: float, seed: int) -> str:
    return f"gamma-{gamma:g}-seed-{seed}".replace(".", "p")


def finished() -> pd.DataFrame:
    """The experiments of this commit that have metrics, by name."""
    shown = subprocess.run(
        ["dvc", "exp", "show", "--csv"], check=True, capture_output=True, text=True
    ).stdout
    table = pd.read_csv(io.StringIO(shown))
    table = table[table["Experiment"].notna() & table["accuracy"].notna()]
    return table.set_index("Experiment")


def run_missing(gammas: list[float], seeds: list[int], jobs: int) -> None:
    """Run what is missing: the first gamma of every seed first, which fills DVC's run cache."""
    for group in (gammas[:1], gammas[1:]):
        names = set(finished().index)
        grid = [(gamma, seed) for seed in seeds for gamma in group]
        missing = [pair for pair in grid if name_of(*pair) not in names]
        for gamma, seed in missing:
            changes = ["-S", f"gamma={gamma}", "-S", f"seed={seed}"]
            queue = ["dvc", "exp", "run", "--queue", "--name", name_of(gamma, seed)]
            subprocess.run([*queue, *changes], check=True)
        if missing:
            start_workers(jobs)
            wait_for({name_of(*pair) for pair in missing}, jobs)


def start_workers(jobs: int) -> None:
    subprocess.run(["dvc", "queue", "start", "--jobs", str(jobs)], check=True)


def wait_for(names: set[str], jobs: int) -> None:
    """Return when the queue has run these experiments.

    DVC 3.67's workers sometimes die between two experiments (their broker reads a file while it is
    written); this starts them again.

    Raises:
        UserError: an experiment failed.
    """
    while True:
        status = subprocess.run(
            ["dvc", "queue", "status"], check=True, capture_output=True, text=True
        ).stdout
        words = [line.split() for line in status.splitlines()]
        states = {row[1]: row for row in words if len(row) > 1 and row[1] in names}
        failed = sorted(name for name, row in states.items() if "Failed" in row)
        if failed:
            raise UserError(f"{failed[0]} failed; `dvc queue logs {failed[0]}` says why")
        if not any({"Queued", "Running"} & set(row) for row in states.values()):
            return
        if "0 active, 0 idle" in status:
            start_workers(jobs)
        time.sleep(POLL_SECONDS)


def summary(table: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds for each gamma, as Markdown."""
    percent = {name for name in METRICS if name.endswith("accuracy")} | {"flops_saved"}
    rows = [
        [f"{gamma:g}", *(mean_and_std(group[name], percent=name in percent) for name in METRICS)]
        for gamma, group in table.groupby("gamma")
    ]
    return markdown_table(["gamma", *METRICS.values()], rows)


def add_options(parser: Parser) -> None:
    parser.add_argument("--gammas", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/digits_seeds.csv"))


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Run the grid, write every experiment's row, print the means."""
    run_missing(arguments.gammas, arguments.seeds, arguments.jobs)
    names = [name_of(g, s) for g in arguments.gammas for s in arguments.seeds]
    table = finished().loc[names, ["gamma", "seed", *METRICS]].sort_values(["gamma", "seed"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out)
    print(f"\n{len(arguments.seeds)} seeds, rows in {arguments.out}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
