"""The trade-off as means over seeds: a grid of DVC experiments, and a table of what they gave.

`python -m tools.study --gammas 1 2 5 10 --seeds 0 1 2 3 4` on the current commit and params.yaml. What
does not depend on gamma runs once for each seed. Experiments that are there already are not repeated.
"""

import io
import subprocess
import time
from pathlib import Path

import pandas as pd

from tools.command import Parser, mendable

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
    """The DVC experiment's name."""
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
    for round_of in (gammas[:1], gammas[1:]):
        there = set(finished().index)
        wanted = [(gamma, seed) for seed in seeds for gamma in round_of]
        missing = [pair for pair in wanted if name_of(*pair) not in there]
        for gamma, seed in missing:
            change = ["-S", f"gamma={gamma}", "-S", f"seed={seed}"]
            command = ["dvc", "exp", "run", "--queue", "--name", name_of(gamma, seed), *change]
            subprocess.run(command, check=True)
        if missing:
            start(jobs)
            wait_for({name_of(*pair) for pair in missing}, jobs)


def start(jobs: int) -> None:
    """Let workers take from the queue."""
    subprocess.run(["dvc", "queue", "start", "--jobs", str(jobs)], check=True)


def wait_for(names: set[str], jobs: int) -> None:
    """Return when the queue is done with these experiments.

    DVC 3.67's workers die now and then between two experiments (their broker reads a file that is
    being written); then they are started again.

    Raises:
        SystemExit: one of them failed.
    """
    while True:
        status = subprocess.run(
            ["dvc", "queue", "status"], check=True, capture_output=True, text=True
        ).stdout
        words = [line.split() for line in status.splitlines()]
        states = {row[1]: row for row in words if len(row) > 1 and row[1] in names}
        failed = sorted(name for name, row in states.items() if "Failed" in row)
        if failed:
            raise SystemExit(f"error: {failed[0]} failed; `dvc queue logs {failed[0]}` says why")
        if not any({"Queued", "Running"} & set(row) for row in states.values()):
            return
        if "0 active, 0 idle" in status:
            start(jobs)
        time.sleep(POLL_SECONDS)


def summary(table: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds for each gamma, as Markdown."""
    lines = [
        "| gamma | " + " | ".join(METRICS.values()) + " |",
        "|---" * (1 + len(METRICS)) + "|",
    ]
    for gamma, group in table.groupby("gamma"):
        cells = []
        for name in METRICS:
            percent = name.endswith("accuracy") or name == "flops_saved"
            scale, unit = (100, " %") if percent else (1, "")
            cells.append(f"{scale * group[name].mean():.2f} +- {scale * group[name].std():.2f}{unit}")
        lines.append(f"| {gamma:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@mendable()
def main() -> None:
    """Run the grid, write every experiment's row, print the means."""
    parser = Parser(description=__doc__)
    parser.add_argument("--gammas", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/digits_seeds.csv"))
    arguments = parser.parse_args()
    run_missing(arguments.gammas, arguments.seeds, arguments.jobs)
    names = [name_of(g, s) for g in arguments.gammas for s in arguments.seeds]
    table = finished().loc[names, ["gamma", "seed", *METRICS]].sort_values(["gamma", "seed"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out)
    print(f"\n{len(arguments.seeds)} seeds, rows in {arguments.out}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
