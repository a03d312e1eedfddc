"""The folder results/: a row for each finished run, and the table and figures of all rows.

`python -m research.results record NAME --preset PRESET` after `dvc repro` writes results/rows/NAME.json
from the metrics and outcomes in the working tree; `python -m research.results table` writes
results/README.md, and a figure for each network, from all rows. Networks that were trained from others'
weights have a table of their own, because their rivals start from these weights too.
"""

import argparse
import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config
from pipeline.device import choose_device, describe_machine
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from pipeline.infra.git import git
from pipeline.infra.resume import project_root
from pipeline.report.comparison import PAPER
from pipeline.report.paired import paired_difference
from pipeline.report.tables import markdown_table
from pipeline.report.trade_off import trade_off
from pipeline.static_policies import RULES
from stages.support.common import read_csv, read_json
from tools import preset as presets
from tools.command import Parser, command

FOLDER = project_root() / "results"
ROWS = "rows"
SPEEDUP_BATCH_SIZES = (1, 32, 256)  # whose speed-up the table shows
TRAININGS = ("pretrain", "curriculum", "finetune")
OURS = ("import/none", "pretrained/")  # of checkpoints.pretrain: trained here
INTRODUCTION = """\
# Results

Written by `python -m research.results table` from `rows/`, each of which holds all parameters,
metrics, times, versions and hardware of one run. Every run measures the test images once. FLOPs:
2 per multiply-add, the policy network included. Differences: Newcombe's 95 % interval for pairs over
the test images; rows marked * have an older interval, by a paired bootstrap. The intervals hold for
these trained networks, not for other seeds. Speed-up: the time of the fastest form of the full network
divided by BlockDrop's, fp32, on the machine named below; - where it was not measured reliably.
"""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A static network beside BlockDrop."""

    name: str
    kind: str  # full, sole, ensemble, or the static rule that it was finetuned under
    depth: int
    blocks: int  # that run
    accuracy: float
    flops: float
    blockdrop_minus_it: Sequence[float]  # difference in accuracy, with the ends of its 95 % interval
    # images that BlockDrop alone classifies correctly, and that the rival alone does; None in older
    # rows, whose interval is a paired bootstrap
    right_alone: Sequence[int] | None = None
    correct: str = ""  # test images that it classifies correctly, `packed`; empty in older rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run, as a file of results/rows/ holds it."""

    preset: str
    changes: Mapping[str, Any]  # values of params.yaml that differ from the preset's, by dotted key
    params: Mapping[str, Any]  # all values of params.yaml, by dotted key
    commit: str
    machine: Mapping[str, Any]
    test_images: int
    evaluate: Mapping[str, float]  # metrics/evaluate.json
    rivals: Sequence[Rival]
    times: Mapping[str, Mapping[str, Any]]  # seconds and device of each training
    # speed-ups, empty where the benchmark did not run
    benchmark: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    correct: str = ""  # the test images that BlockDrop classifies correctly, as `packed` writes them

    @classmethod
    def load(cls, path: Path) -> "Row":
        content = read_json(path)
        return cls(**content | {"rivals": [Rival(**rival) for rival in content["rivals"]]})

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @property
    def network(self) -> "Network":
        start = self.params["checkpoints.pretrain"]
        return Network(
            source=self.params["data.source"],
            depth=self.params["resnet.depth"],
            start="" if start.startswith(OURS) else Path(start).name,
        )


class Network(NamedTuple):
    """What the rows of one table and figure have in common."""

    source: str
    depth: int
    start: str  # the file of the weights that training started from; empty: from random weights

    @property
    def title(self) -> str:
        return f"ResNet-{self.depth} on {self.source}" + (f", from {self.start}" if self.start else "")

    @property
    def figure_name(self) -> str:
        ending = f"_from_{Path(self.start).stem}" if self.start else ""
        return f"trade_off_{self.source}_resnet{self.depth}{ending}.png"


# --- a row, from a working tree


def row_of(root: Path, preset: str, *, note: str = "") -> Row:
    """The finished run in a working tree.

    Raises:
        UserError: the run is not finished there, or Git knows no commit of it.
    """
    params = config.load(root / "params.yaml")
    of_preset = presets.load(preset, root / "presets").flat()
    for name in ("metrics/evaluate.json", "plots/evaluate/images.csv", "plots/baseline/curves.csv"):
        if not (root / name).exists():
            raise UserError(f"{name} is missing; finish `dvc repro` first")
    evaluate = read_json(root / "metrics/evaluate.json")
    commit = git("-C", str(root), "rev-parse", "--short", "HEAD")
    if not commit:
        raise UserError(f"{root} has no Git commit; commit what was run")
    correct = correctness_of(root)
    times = {path.stem: read_json(path) for path in sorted((root / "metrics/times").glob("*.json"))}
    measured = root / "metrics/benchmark.json"
    benchmark = read_json(measured)["benchmark"] if measured.exists() else {}
    return Row(
        preset=preset,
        changes={key: value for key, value in params.flat().items() if of_preset[key] != value},
        params=params.flat(),
        commit=commit,
        machine=describe_machine(choose_device()),
        test_images=len(correct["blockdrop"]),
        evaluate=evaluate,
        rivals=rivals_of(root, correct),
        times={
            name: {key: time.get(key) for key in ("seconds", "device")} for name, time in times.items()
        },
        benchmark={name: ratio for name, ratio in benchmark.items() if name.startswith("speedup_")},
        note=note,
        correct=packed(correct["blockdrop"]),
    )


def packed(correct: NDArray[np.bool_]) -> str:
    """[M] as base64 of a bit for each image: a row then has what a paired comparison needs."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    """What `packed` was given, [M] for M images."""
    packed_bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed_bits, count=images).astype(bool)


def correctness_of(root: Path) -> dict[str, NDArray[np.bool_]]:
    """Whether each network classifies each test image correctly, in order, [M] by the network's name."""
    evaluated = read_csv(root / "plots/evaluate/images.csv")
    correct = {"blockdrop": np.array([row["correct"] == "1" for row in evaluated])}
    rows = read_csv(root / "plots/baseline/images.csv")
    for name in rows[0].keys() - {"image"}:
        correct[name] = np.array([row[name] == "1" for row in rows])
    return correct


def rivals_of(root: Path, correct: Mapping[str, NDArray[np.bool_]]) -> list[Rival]:
    """What was trained to compare with: every block, the finetuned rules, and ensembles."""
    rivals = []
    for line in read_csv(root / "plots/baseline/curves.csv"):
        kind = line["kind"]
        if kind in RULES and line["finetuned"] != "1":
            continue
        name = line["name"]
        difference = paired_difference(correct["blockdrop"], correct[name])
        rivals.append(
            Rival(
                name=name,
                kind=kind,
                depth=int(line["depth"]),
                blocks=int(line["blocks"]),
                accuracy=float(line["accuracy"]),
                flops=float(line["flops"]),
                blockdrop_minus_it=difference[:3],
                right_alone=(difference.only_first, difference.only_second),
                correct=packed(correct[name]),
            )
        )
    return rivals


# --- table and figures, from rows


def table(rows: Mapping[str, Row]) -> str:
    """results/README.md: for each network its runs by rising FLOPs, and their rivals."""
    parts = [INTRODUCTION]
    for network in sorted({row.network for row in rows.values()}):
        of_network = {name: row for name, row in rows.items() if row.network == network}
        parts += [
            f"## {network.title}\n",
            run_table(of_network) + "\n",
            "Beside static networks:\n",
            rival_table(of_network) + "\n",
            "How:\n",
            "\n".join(provenance(name, row) for name, row in of_network.items()) + "\n",
        ]
    for source in sorted({row.network.source for row in rows.values()}):
        parts += published(source)
    return "\n".join(parts)


def run_table(rows: Mapping[str, Row]) -> str:
    headers = [
        "run", "gamma", "seed", "accuracy", "blocks", "FLOPs", "of the full", "policies (effective)",
        "another image's policy", "speed-up at batch 1, 32, 256", "training (min)", "commit",
    ]  # fmt: skip
    cells = []
    for name, row in sorted(rows.items(), key=lambda item: item[1].evaluate["flops_mean"]):
        e = row.evaluate
        # the fastest static network's time divided by BlockDrop's; - where it is not reliable
        ratios = [row.benchmark.get(f"speedup_batch{size}_fp32") for size in SPEEDUP_BATCH_SIZES]
        cells.append(
            [
                name,
                f"{row.params['gamma']:g}",
                row.params["seed"],
                f"{100 * e['accuracy']:.2f} %",
                f"{e['blocks_mean']:.2f} ± {e['blocks_std']:.2f} of {e['num_blocks']}",
                f"{e['flops_mean']:.3g}",
                f"{100 * e['flops_mean'] / e['full_flops']:.1f} %",
                f"{e['unique_policies']:.0f} ({e['effective_policies']:.1f})",
                f"{100 * e['shuffled_accuracy']:.2f} %",
                ", ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                minutes_of(row),
                row.commit,
            ]
        )
    return markdown_table(headers, cells)


def rival_table(rows: Mapping[str, Row]) -> str:
    cells = []
    for name, row in rows.items():
        for rival in row.rivals:
            mean, low, high = (100 * value for value in rival.blockdrop_minus_it)
            mark = " *" if rival.right_alone is None else ""
            cells.append(
                [
                    name,
                    rival.name,
                    f"{100 * rival.accuracy:.2f} %",
                    f"{rival.flops:.3g}",
                    f"{mean:+.2f} ({low:+.2f} to {high:+.2f}){mark}",
                ]
            )
    headers = ["run", "rival", "its accuracy", "its FLOPs", "BlockDrop minus it, points"]
    return markdown_table(headers, cells)


def provenance(name: str, row: Row) -> str:
    """How to run it again, on which machine it ran, and its note."""
    devices = sorted({time["device"] for time in row.times.values() if time.get("device")})
    machine = "; ".join([row.machine["processor"], *devices])
    return f"- {name}: {command_of(row)}; {machine}" + (f". {row.note}" if row.note else "")


def command_of(row: Row) -> str:
    preset = f"make preset NAME={row.preset}"
    options = " ".join(f"-S {key}={json.dumps(value)}" for key, value in row.changes.items())
    return f"`{preset} && " + (f"dvc exp run {options}`" if options else "make repro`")


def minutes_of(row: Row) -> str:
    """Minutes that each of the three trainings took; - for one that was imported."""
    seconds = [row.times.get(stage, {}).get("seconds") for stage in TRAININGS]
    return " + ".join("-" if s is None else f"{s / 60:.0f}" for s in seconds)


def published(source: str) -> list[str]:
    """The section of what papers report on a data set; empty if there is none."""
    numbers = [number for (of, _), group in PAPER.items() if of == source for number in group]
    if not numbers:
        return []
    cells = [
        [label, f"{100 * accuracy:.2f} %", "-" if flops is None else f"{flops:.3g}"]
        for label, accuracy, _, flops in numbers
    ]
    heading = f"## Published on {source}, by other recipes\n"
    return [heading, markdown_table(["what", "accuracy", "FLOPs"], cells) + "\n"]


def _decision_of(row: Row) -> str:
    """What a label says of how the policy decides."""
    paths = row.params.get("policy_net.paths")  # older rows do not have it
    if not paths:
        return ", block by block"
    return f", paths {' and '.join(map(str, paths))} by ResNet-{row.params['policy_net.depth']}"


def figure(path: Path, rows: Sequence[Row]) -> None:
    """The trade-off of one network's runs beside their rivals, which here are single networks alone.

    Runs that differ in the seed share a label. Pruned networks are left out, since rules of one name are
    drawn as their mean; docs/pruning.md has them.
    """
    rows = [row for row in rows if not row.params.get("prune.ratio")]  # older rows do not have it
    if not rows:
        return
    rivals = {
        (rival.name, rival.accuracy): rival
        for row in rows
        for rival in row.rivals
        if rival.kind != "ensemble"
    }
    baselines = [
        {
            "name": rival.name, "kind": rival.kind, "depth": rival.depth, "blocks": rival.blocks,
            "flops": rival.flops, "accuracy": rival.accuracy, "accuracy_std": 0.0,
            "finetuned": int(rival.kind in RULES),
        }
        for rival in rivals.values()
    ]  # fmt: skip
    points = []
    labels: set[str] = set()
    for row in rows:
        label = f"gamma {row.params['gamma']:g}" + _decision_of(row)
        points.append(
            {
                "label": "" if label in labels else label,
                "flops": row.evaluate["flops_mean"],
                "accuracy": row.evaluate["accuracy"],
            }
        )
        labels.add(label)
    trade_off(
        path, baselines=baselines, blockdrop=points, title=rows[0].network.title,
        images=rows[0].test_images,
    )  # fmt: skip


def add_options(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write the row of the run in the working tree")
    record.add_argument("name")
    record.add_argument("--preset", required=True)
    record.add_argument("--note", default="", help="what a reader of the row must know besides")
    record.add_argument("--root", type=Path, default=project_root())
    commands.add_parser("table", help="write the table and the figures of all rows")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Record a row, or write the table and the figures."""
    if arguments.command == "record":
        row = row_of(arguments.root, arguments.preset, note=arguments.note)
        path = FOLDER / ROWS / f"{arguments.name}.json"
        row.save(path)
        print(f"{path.relative_to(project_root())}: {100 * row.evaluate['accuracy']:.2f} %")
        return
    rows = {path.stem: Row.load(path) for path in sorted((FOLDER / ROWS).glob("*.json"))}
    write_text(FOLDER / "README.md", table(rows))
    for network in sorted({row.network for row in rows.values()}):
        figure(FOLDER / network.figure_name, [row for row in rows.values() if row.network == network])


if __name__ == "__main__":
    main()
