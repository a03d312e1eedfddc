"""report: one page on the experiment, as Markdown and as HTML, from what the other stages wrote."""

import os
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np

from pipeline.config import Params
from pipeline.device import choose_device, describe_machine
from pipeline.infra.git import git
from pipeline.report import html, markdown
from pipeline.report.comparison import Results, TrainingTimes, published
from pipeline.report.markdown import Origin
from pipeline.report.trade_off import trade_off
from pipeline.results import Baselines, BenchmarkResult, Evaluation, from_json
from pipeline.tracking import dvc_results, experiment_runs, overview
from pipeline.tracking.identity import baseline_commit
from pipeline.tracking.runs import StageRun, stage_run
from pipeline.tracking.store import experiment_id
from stages.support import common

OUT = Path("report")
EVALUATED, BASELINES = common.PLOTS / "evaluate", common.PLOTS / "baseline"
TRADE_OFF = common.PLOTS / "trade_off.csv"
WRITTEN = ("dvc.lock", "metrics", "plots", "models")  # by stages: no change of the user's


def read(params: Params) -> Results:
    """What the stages wrote; of folders that hold more, only what params.yaml names."""
    trainings = ["pretrain", "curriculum", "finetune"]
    trainings += ["prune"] if params.prune.ratio else []
    trainings += ["policy_pretrain"] if params.policy_net.paths else []
    trainings += [f"sole-{depth}" for depth in params.sole.depths]
    pairs = product(params.static.rules, params.static.num_kept)
    trainings += [f"static-{rule}-{num_kept}" for rule, num_kept in pairs]
    times = common.METRICS / "times"
    blockdrop = common.read_csv(EVALUATED / "images.csv")
    baselines = common.read_csv(BASELINES / "images.csv")
    names = [name for name in baselines[0] if name != "image"]
    correctness = {name: np.array([row[name] == "1" for row in baselines]) for name in names}
    correctness["blockdrop"] = np.array([row["correct"] == "1" for row in blockdrop])
    return Results(
        params=params.flat(),
        evaluated=from_json(Evaluation, common.read_json(common.METRICS / "evaluate.json")),
        baselines=from_json(Baselines, common.read_json(common.METRICS / "baseline.json")),
        correctness=correctness,
        blocks=np.array([int(row["blocks"]) for row in blockdrop]),
        times={
            name: from_json(TrainingTimes, common.read_json(times / f"{name}.json"))
            for name in trainings
        },
        benchmark=from_json(
            BenchmarkResult, common.read_json(common.PLOTS / "benchmark/benchmark.json")
        ),
        machine=describe_machine(choose_device()),
    )


def draw(results: Results) -> None:
    """The figures of the report: its own one, and copies of those of other stages."""
    evaluated = results.evaluated
    title = f"ResNet-{results.params['resnet.depth']} on {results.params['data.source']}"
    point = {
        "accuracy": evaluated.accuracy,
        "flops": evaluated.flops_mean,
        "gamma": results.params["gamma"],
        "label": f"BlockDrop, gamma {results.params['gamma']:g}",
    }
    baselines = [_as_numbers(row) for row in common.read_csv(BASELINES / "curves.csv")]
    paper = [
        {"accuracy": network.accuracy, "flops": network.flops, "label": network.name}
        for network in published(results.params)
        if network.flops is not None
    ]
    trade_off(
        OUT / "trade_off.png",
        baselines=baselines,
        blockdrop=[point],
        paper=paper,
        dial=[_as_numbers(row) for row in common.read_csv(EVALUATED / "dial.csv")],
        title=title,
        images=len(results.blocks),
    )
    for folder in (EVALUATED, common.PLOTS / "benchmark"):
        for picture in sorted([*folder.glob("*.png"), *folder.glob("*.svg")]):
            (OUT / picture.name).write_bytes(picture.read_bytes())
    rows = [*baselines, {"kind": "BlockDrop", **point}]
    common.write_csv(
        TRADE_OFF, [{name: row[name] for name in ("kind", "flops", "accuracy")} for row in rows]
    )


def origin_of(run: StageRun) -> Origin:
    """Where the results come from; with links where MLflow has them."""
    commit = baseline_commit()
    links: dict[str, str] = {}
    if run.parent_id:
        run.attempt(lambda: links.update(overview.run_links(experiment_id(), run.parent_id)))
    ignored = [f":!{path}" for path in WRITTEN]
    changed = git("diff", "--name-only", "--relative", commit, "--", ".", *ignored) if commit else ""
    return Origin(
        written=datetime.now(UTC),
        commit=git("rev-parse", "--short", commit) or commit[:7],
        changed=changed.splitlines(),
        experiment=os.environ.get("DVC_EXP_NAME", ""),
        links=links,
    )


def log(run: StageRun) -> None:
    """Complete the experiment's parent run, with what came from the cache too: its code never ran."""

    def complete() -> None:
        files = dvc_results.work_tree()
        try:
            record = dvc_results.read(files, name="", baseline=baseline_commit(), running="report")
        except dvc_results.RecordError as error:
            print(f"report: not logged, {error}")
            return
        experiment_runs.complete(record, finish=False)
        if "BLOCKDROP_SYNCED_LATER" not in os.environ:  # by `make repro`, which shows it then
            overview.say(run.parent_id)

    if run.parent_id:
        run.attempt(complete)


def main(params: Params) -> None:
    """Write report/report.md and report/report.html with their pictures, and plots/trade_off.csv."""
    with stage_run("report", params.flat()) as mlflow_run:
        OUT.mkdir(exist_ok=True)
        results = read(params)
        draw(results)
        text = markdown.page(results, origin_of(mlflow_run))
        (OUT / "report.md").write_text(text, encoding="utf-8")
        (OUT / "report.html").write_text(html.page(text, OUT), encoding="utf-8")
        log(mlflow_run)
    print(f"report: {OUT / 'report.html'}")


def _as_numbers(row: dict[str, str]) -> dict[str, str | float]:
    whole = {"depth", "finetuned"}
    return {
        name: text if name in ("name", "kind") else int(text) if name in whole else float(text)
        for name, text in row.items()
    }


if __name__ == "__main__":
    common.run(main)
