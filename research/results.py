"""The folder results/: rows of finished runs, and the table and figure of all of them.

`python -m tools.results record NAME --preset PRESET` after `dvc repro` writes results/rows/NAME.json
from the metrics and outcomes in the working tree; `python -m tools.results table` writes
results/README.md and a figure for each network from all rows. Where others' weights were the start,
that is a network of its own: its rivals are finetuned from these weights too.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config as params_file
from pipeline.config import Params
from pipeline.device import choose_device, describe_machine
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from pipeline.infra.git import git
from pipeline.infra.resume import project_root
from pipeline.report.markdown import PAPER
from pipeline.report.paired import paired_difference
from pipeline.report.trade_off import trade_off
from tools.command import Parser, mendable

FOLDER = project_root() / "results"
ROWS = "rows"
SPEEDUPS = (1, 32, 256)  # batch sizes whose speed-up the table shows
TRAININGS = ("pretrain", "curriculum", "finetune")
OURS = ("import/none", "pretrained/")  # of checkpoints.pretrain: trained here
Row = Mapping[str, Any]


class Network(NamedTuple):
    """What rows of one table and figure have in common.

    Attributes:
        start: the file of the weights it was started from; empty: it was trained from random weights.
    """

    source: str
    depth: int
    start: str

    @property
    def title(self) -> str:
        """In words."""
        return f"ResNet-{self.depth} on {self.source}" + (f", from {self.start}" if self.start else "")

    @property
    def file(self) -> str:
        """Of its figure."""
        ending = f"_from_{Path(self.start).stem}" if self.start else ""
        return f"trade_off_{self.source}_resnet{self.depth}{ending}.png"


def outcomes_of(root: Path) -> dict[str, NDArray[np.bool_]]:
    """Whether each network is right on each test image, in order, [M] for each name."""
    found: dict[str, list[str]] = {}
    for name in ("evaluate", "baseline"):
        path = root / "plots" / name / "images.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    for column, value in row.items():
                        found.setdefault(f"{name}.{column}", []).append(value)
    wanted = {
        "blockdrop" if name == "evaluate.correct" else name.removeprefix("baseline."): values
        for name, values in found.items()
        if name == "evaluate.correct" or name.startswith("baseline.")
    }
    return {name: np.array(v) == "1" for name, v in wanted.items() if name != "image"}


def changes(own: Params, preset: Params) -> dict[str, Any]:
    """What params.yaml has otherwise than the preset, by dotted key."""
    before = preset.flat()
    return {key: value for key, value in own.flat().items() if before[key] != value}


def row_of(root: Path, preset: str) -> dict[str, Any]:
    """The finished run in a working tree: parameters, results, rivals, seconds, hardware, commit.

    Raises:
        UserError: the run is not finished there.
    """
    params = params_file.load(root / "params.yaml")
    evaluated = _read(root, "metrics/evaluate.json")
    outcomes = outcomes_of(root)
    rivals = []
    curves = root / "plots/baseline/curves.csv"
    table = csv.DictReader(curves.open(encoding="utf-8", newline="")) if curves.exists() else ()
    for line in table:
        name = {"full": "full", "sole": f"sole-{line['depth']}"}.get(
            line["kind"], f"{line['kind']}-{line['blocks']}"
        )
        if line["kind"] in ("full", "sole") or line["finetuned"] == "1":
            difference = paired_difference(outcomes["blockdrop"], outcomes[name])
            rivals.append(
                {
                    "name": name,
                    "depth": int(line["depth"]),
                    "blocks": int(line["blocks"]),
                    "kind": line["kind"],
                    "accuracy": float(line["accuracy"]),
                    "flops": float(line["flops"]),
                    "blockdrop_minus_it": difference[:3],
                    "right_alone": [difference.only_first, difference.only_second],
                }
            )
    seconds = {}
    for path in sorted((root / "metrics/times").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds[path.stem] = {key: content.get(key) for key in ("seconds", "device")}
    return {
        "preset": preset,
        "changes": changes(params, params_file.load(root / "presets" / f"{preset}.yaml")),
        "params": params.flat(),
        "commit": git("rev-parse", "--short", "HEAD", folder=root),
        "machine": describe_machine(choose_device()),
        "test_images": len(outcomes["blockdrop"]),
        "evaluate": evaluated,
        "rivals": rivals,
        "times": seconds,
        "benchmark": _speedups(root),
    }


def _speedups(root: Path) -> dict[str, float]:
    """How much faster, of the benchmark stage's metrics; nothing where it did not run."""
    path = root / "metrics/benchmark.json"
    found = json.loads(path.read_text(encoding="utf-8"))["benchmark"] if path.exists() else {}
    return {name: value for name, value in found.items() if name.startswith("speedup_")}


def _read(root: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((root / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise UserError(f"{name} is missing; finish `dvc repro` first") from None


def command_of(row: Row) -> str:
    """What a reader types to have the row again."""
    text = f"make preset NAME={row['preset']}"
    options = " ".join(f"-S {key}={json.dumps(value)}" for key, value in row["changes"].items())
    return f"`{text} && " + (f"dvc exp run {options}`" if options else "make repro`")


def minutes_of(row: Row) -> str:
    """Minutes of training of the three stages, those that were trained."""
    spent = [row["times"].get(stage, {}).get("seconds") for stage in TRAININGS]
    return " + ".join("-" if s is None else f"{s / 60:.0f}" for s in spent)


def speedup_of(row: Row, batch_size: int) -> str:
    """The best static network's time by BlockDrop's in fp32, where the benchmark could tell."""
    found = row.get("benchmark", {}).get(f"speedup_batch{batch_size}_fp32")
    return "-" if found is None else f"{found:.2f}"


def table(rows: Mapping[str, Row]) -> str:
    """results/README.md: for each network one table, BlockDrop by rising FLOPs, rivals beside it."""
    lines = [
        "# Results",
        "",
        "Written by `python -m tools.results table` from `rows/`, each of which holds all parameters,",
        "metrics, times, versions and hardware of one run. Test images are touched once a run. FLOPs:",
        "2 per multiply-add, the policy network included. Differences: Newcombe's 95 % interval for",
        "pairs over the test images; * marks rows of before, by a paired bootstrap. They hold for these",
        "trained networks, not for other seeds. Faster: the time of",
        "the best static form of the full network by BlockDrop's, fp32, on the machine below; none",
        "where it was not measured reliably.",
    ]
    for network in sorted({_network(row) for row in rows.values()}):
        own = {name: row for name, row in rows.items() if _network(row) == network}
        lines += ["", f"## {network.title}", ""]
        lines += _table(own)
    for source in sorted({_network(row).source for row in rows.values()}):
        lines += _published(source)
    return "\n".join(lines) + "\n"


def _network(row: Row) -> Network:
    start = row["params"]["checkpoints.pretrain"]
    return Network(
        source=row["params"]["data.source"],
        depth=row["params"]["resnet.depth"],
        start="" if start.startswith(OURS) else Path(start).name,
    )


def _published(source: str) -> list[str]:
    """What papers say of networks on that data set."""
    numbers = [number for (on, _), of_one in PAPER.items() if on == source for number in of_one]
    if not numbers:
        return []
    return [
        "", f"## Published on {source}, by other recipes", "",
        "| what | accuracy | FLOPs |", "|---|---|---|",
        *(
            f"| {said} | {100 * accuracy:.2f} % | {'-' if flops is None else f'{flops:.3g}'} |"
            for said, accuracy, _, flops in numbers
        ),
    ]  # fmt: skip


def _table(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "| run | gamma | seed | accuracy | blocks | FLOPs | of the full | policies (effective) | "
        "another image's policy | faster at batch 1, 32, 256 | training (min) | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["evaluate"]["flops_mean"]):
        e, p = row["evaluate"], row["params"]
        lines.append(
            f"| {name} | {p['gamma']:g} | {p['seed']} | {100 * e['accuracy']:.2f} % | "
            f"{e['blocks_mean']:.2f} ± {e['blocks_std']:.2f} of {e['num_blocks']} | "
            f"{e['flops_mean']:.3g} | {100 * e['flops_mean'] / e['full_flops']:.1f} % | "
            f"{e['unique_policies']:.0f} ({e['effective_policies']:.1f}) | "
            f"{100 * e['shuffled_accuracy']:.2f} % | "
            f"{', '.join(speedup_of(row, size) for size in SPEEDUPS)} | "
            f"{minutes_of(row)} | {row['commit']} |"
        )
    lines += ["", "Beside static networks:", ""]
    lines += [
        "| run | rival | its accuracy | its FLOPs | BlockDrop minus it, points |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for rival in row["rivals"]:
            mean, low, high = (100 * value for value in rival["blockdrop_minus_it"])
            mark = "" if "right_alone" in rival else " *"
            lines.append(
                f"| {name} | {rival['name']} | {100 * rival['accuracy']:.2f} % | "
                f"{rival['flops']:.3g} | {mean:+.2f} ({low:+.2f} to {high:+.2f}){mark} |"
            )
    lines += ["", "How:", ""]
    for name, row in rows.items():
        devices = {time["device"] for time in row["times"].values() if time.get("device")}
        machine = f"{row['machine']['processor']}; {'; '.join(sorted(devices))}"
        note = f". {row['note']}" if row.get("note") else ""
        lines.append(f"- {name}: {command_of(row)}; {machine}{note}")
    return lines


def figure(path: Path, rows: Sequence[Row]) -> None:
    """The trade-off of one network's runs beside all of their rivals."""
    rivals = {
        (r["name"], r["accuracy"]): {
            "kind": r["kind"], "depth": r["depth"], "blocks": r["blocks"], "flops": r["flops"],
            "accuracy": r["accuracy"], "accuracy_std": 0.0,
            "finetuned": int(r["kind"] not in ("full", "sole")),
        }
        for row in rows
        for r in row["rivals"]
    }  # fmt: skip
    points = [
        {
            "gamma": row["params"]["gamma"],
            "label": _label(row, rows),
            "flops": row["evaluate"]["flops_mean"],
            "accuracy": row["evaluate"]["accuracy"],
            "blocks": row["evaluate"]["blocks_mean"],
        }
        for row in rows
    ]
    title = _network(rows[0]).title
    trade_off(path, baselines=list(rivals.values()), blockdrop=points, title=title)


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The gamma, and the seed where rows differ in it."""
    several = len({other["params"]["seed"] for other in rows}) > 1
    said = f"gamma {row['params']['gamma']:g}"
    return f"{said}, seed {row['params']['seed']}" if several else said


@mendable()
def main() -> None:
    """Record a row, or write the table and the figures."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("name")
    record.add_argument("--preset", required=True)
    record.add_argument("--note", default="", help="what a reader of the row must know besides")
    record.add_argument("--root", type=Path, default=project_root())
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "record":
        row = row_of(arguments.root, arguments.preset) | {"note": arguments.note}
        path = FOLDER / ROWS / f"{arguments.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(row, indent=1, sort_keys=True) + "\n")
        print(f"{path.relative_to(project_root())}: {100 * row['evaluate']['accuracy']:.2f} %")
        return
    rows = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((FOLDER / ROWS).glob("*.json"))
    }
    write_text(FOLDER / "README.md", table(rows))
    for network in sorted({_network(row) for row in rows.values()}):
        figure(FOLDER / network.file, [row for row in rows.values() if _network(row) == network])


if __name__ == "__main__":
    main()
