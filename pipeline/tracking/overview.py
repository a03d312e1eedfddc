"""The store's content for people: a table of experiments, and links that open them in the UI."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.infra.safe_io import printable
from pipeline.tracking.experiment_runs import TAG_SUPERSEDED
from pipeline.tracking.identity import SWEPT
from pipeline.tracking.runs import TAG_ROLE
from pipeline.tracking.store import store, store_uri, ui_address
from pipeline.tracking.units import counted
from pipeline.tracking.view import QUERY, SHARED_QUERY

LINE = 120  # characters, where there is no terminal
MAX_ROWS = 20  # experiments in the table, newest first
COLUMNS = {
    "accuracy": ("accuracy", 100, "%"),
    "full_accuracy": ("every block", 100, "%"),
    "blocks_mean": ("blocks", 1, ""),
    "flops_saved": ("FLOPs saved", 100, "%"),
    "unique_policies": ("policies", 1, ""),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A parent run that has results; its metrics have the names and units of the files of metrics."""

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def unswept(self) -> dict[str, str]:
        """The parameters that are the same in all experiments that show one trade-off."""
        return {key: text for key, text in self.params.items() if key not in SWEPT}


def experiments() -> tuple[str, list[Experiment]]:
    """The MLflow experiment's id, and the experiments with results, newest first."""
    with store() as (client, experiment_id):
        runs = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{TAG_ROLE}` = 'parent'",
            order_by=["attributes.start_time DESC"],
            max_results=1000,
        )
    finished = [
        Experiment(
            run_id=run.info.run_id,
            name=run.info.run_name,
            params=run.data.params,
            metrics=counted(run.data.metrics),
        )
        for run in runs
        if "accuracy" in run.data.metrics and TAG_SUPERSEDED not in run.data.tags
    ]
    return experiment_id, finished


def siblings(chosen: Experiment, others: Sequence[Experiment]) -> list[Experiment]:
    """An experiment and those that differ from it in swept parameters alone, one of each setting.

    Of equal settings (run again under another commit, say) the first counts, `chosen` before all.
    """
    by_setting: dict[tuple[str | None, ...], Experiment] = {}
    for experiment in (chosen, *others):
        if experiment.unswept == chosen.unswept:
            by_setting.setdefault(tuple(experiment.params.get(k) for k in sorted(SWEPT)), experiment)
    return list(by_setting.values())


def table(shown: Sequence[Experiment], *, marked: str = "") -> list[list[str]]:
    """Header and rows: name, gamma and headline metrics; the run `marked` gets a star."""
    rows = [["experiment", "gamma", *(title for title, _, _ in COLUMNS.values())]]
    for experiment in shown[:MAX_ROWS]:
        cells = [
            _cell(experiment.metrics.get(name), scale, unit)
            for name, (_, scale, unit) in COLUMNS.items()
        ]
        star = " *" if experiment.run_id == marked else ""
        rows.append([experiment.name + star, experiment.params.get("gamma", ""), *cells])
    return rows


def links(
    experiment_id: str, shown: Sequence[Experiment], run_id: str, *, address: str | None = None
) -> dict[str, str]:
    """Addresses of the table of runs, of one experiment, and of its comparison with its siblings."""
    pages = run_links(experiment_id, run_id, address=address)
    chosen = next((experiment for experiment in shown if experiment.run_id == run_id), None)
    if chosen is None:
        return {"all runs": pages["all runs"]}
    compared = [experiment.run_id for experiment in siblings(chosen, shown)]
    if len(compared) > 1:
        runs, ids = (quote(json.dumps(i)) for i in (compared[:MAX_ROWS], [experiment_id]))
        base = f"{address or ui_address()}/#"
        pages["its gammas compared"] = f"{base}/compare-runs?runs={runs}&experiments={ids}&{QUERY}"
    return pages


def run_links(experiment_id: str, run_id: str, *, address: str | None = None) -> dict[str, str]:
    """Addresses of the table of runs and of one run, finished or not."""
    runs = f"{address or ui_address()}/#/experiments/{experiment_id}/runs"
    return {"all runs": f"{runs}?{SHARED_QUERY}", "this experiment": f"{runs}/{run_id}?{QUERY}"}


def _cell(value: float | None, scale: float, unit: str) -> str:
    if value is None:
        return ""
    return f"{scale * value:.2f} {unit}".strip() if unit or value % 1 else f"{value:.0f}"


def say(run_id: str, *, address: str | None = None) -> None:
    """Print the table of experiments and the links; without a server, also how to start one."""
    experiment_id, finished = experiments()
    if not finished:
        print("no experiment has come to its end yet; `make repro` runs one")
        return
    _print_table(table(finished, marked=run_id))
    if address is None and not store_uri().startswith("http"):
        print("`make ui` serves these pages on this machine:")
    for title, link in links(experiment_id, finished, run_id, address=address).items():
        print(f"{title}: {link}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    printed = Table(box=SIMPLE, pad_edge=False)
    for index, title in enumerate(rows[0]):
        # on a narrow terminal names are folded, and no number is cut
        printed.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows[1:]:
        printed.add_row(*(Text(printable(cell)) for cell in row))  # as Text a name is no markup
    width = None if sys.stdout.isatty() else LINE  # a file or a pipe has no width of its own
    Console(width=width, highlight=False).print(printed)
