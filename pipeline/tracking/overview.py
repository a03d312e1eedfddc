"""What is in the store, for people: a table of experiments, and links that open them in the UI."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.infra.safe_io import printable
from pipeline.tracking.experiment_runs import TAG_SUPERSEDED
from pipeline.tracking.runs import TAG_ROLE
from pipeline.tracking.store import compare_page, run_page, runs_page, store, store_uri, ui_address

SWEPT = {"gamma", "curriculum.gamma", "seed"}  # experiments that differ in these alone are compared
LINE = 120  # characters, where there is no terminal
SHOWN = 20  # experiments in the table, newest first
COLUMNS = {
    "accuracy": ("accuracy", 100, "%"),
    "full_accuracy": ("every block", 100, "%"),
    "blocks_mean": ("blocks", 1, ""),
    "flops_saved": ("FLOPs saved", 100, "%"),
    "unique_policies": ("policies", 1, ""),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A parent run that has results."""

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    def is_sibling(self, other: "Experiment") -> bool:
        """Whether they differ in swept parameters alone, so that comparing them shows a trade-off."""
        return _unswept(self) == _unswept(other)


def experiments() -> tuple[str, list[Experiment]]:
    """The MLflow experiment's id, and the experiments with results, newest first."""
    with store() as (client, experiment_id):
        runs = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{TAG_ROLE}` = 'parent'",
            order_by=["attributes.start_time DESC"],
            max_results=1000,
        )
    found = [
        Experiment(
            run_id=run.info.run_id,
            name=run.info.run_name,
            params=run.data.params,
            metrics=run.data.metrics,
        )
        for run in runs
        if "accuracy" in run.data.metrics and TAG_SUPERSEDED not in run.data.tags
    ]
    return experiment_id, found


def siblings(own: Experiment, found: Sequence[Experiment]) -> list[Experiment]:
    """An experiment and those that differ from it in swept parameters alone, one of each setting.

    Of equal settings (run again under another commit, say) the first counts, `own` before all.
    """
    settings: dict[tuple[str | None, ...], Experiment] = {}
    for experiment in (own, *found):
        if experiment.is_sibling(own):
            settings.setdefault(tuple(experiment.params.get(k) for k in sorted(SWEPT)), experiment)
    return list(settings.values())


def table(found: Sequence[Experiment], *, marked: str = "") -> list[list[str]]:
    """Header and rows: name, gamma and the headline; the run `marked` is starred."""
    rows = [["experiment", "gamma", *(said for said, _, _ in COLUMNS.values())]]
    for experiment in found[:SHOWN]:
        cells = [
            _cell(experiment.metrics.get(name), scale, unit)
            for name, (_, scale, unit) in COLUMNS.items()
        ]
        star = " *" if experiment.run_id == marked else ""
        rows.append([experiment.name + star, experiment.params.get("gamma", ""), *cells])
    return rows


def links(
    experiment_id: str, found: Sequence[Experiment], run_id: str, *, address: str | None = None
) -> dict[str, str]:
    """Addresses of the table of runs, of one experiment, and of its comparison with its siblings."""
    base = f"{address or ui_address()}/"
    said = {"all runs": base + runs_page(experiment_id)}
    own = next((experiment for experiment in found if experiment.run_id == run_id), None)
    if own is None:
        return said
    said["this experiment"] = base + run_page(experiment_id, run_id)
    compared = [experiment.run_id for experiment in siblings(own, found)]
    if len(compared) > 1:
        said["its gammas compared"] = base + compare_page(experiment_id, compared[:SHOWN])
    return said


def _unswept(experiment: Experiment) -> dict[str, str]:
    return {key: text for key, text in experiment.params.items() if key not in SWEPT}


def _cell(value: float | None, scale: float, unit: str) -> str:
    if value is None:
        return ""
    return f"{scale * value:.2f} {unit}".strip() if unit or value % 1 else f"{value:.0f}"


def say(run_id: str, *, address: str | None = None) -> None:
    """Print the table of experiments and the links; with no server, how to start one."""
    experiment_id, found = experiments()
    if not found:
        print("no experiment has come to its end yet; `make repro` runs one")
        return
    _print_table(table(found, marked=run_id))
    if address is None and not store_uri().startswith("http"):
        print("`make ui` serves these pages on this machine:")
    for said, link in links(experiment_id, found, run_id, address=address).items():
        print(f"{said}: {link}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    shown = Table(box=SIMPLE, pad_edge=False)
    for index, title in enumerate(rows[0]):
        # where a line is too short for all, names are folded, and no number is cut
        shown.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows[1:]:
        shown.add_row(*(Text(printable(cell)) for cell in row))  # a name is no markup, whatever it holds
    width = None if sys.stdout.isatty() else LINE  # a file or a pipe has no width of its own
    Console(width=width, highlight=False).print(shown)
