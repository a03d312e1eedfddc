"""benchmark: what dropping blocks saves in time on this machine, against the best static networks."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from pipeline.benchmark import figures
from pipeline.benchmark.runner import Benchmark, Settings
from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.device import choose_device, describe_device, describe_machine
from pipeline.flops import measure
from pipeline.inference.base import Networks
from pipeline.infra.locks import exclusive
from pipeline.models import checkpoint
from pipeline.tracking.runs import stage_run
from stages.support import common
from stages.support.progress import Steps

OUT = common.PLOTS / "benchmark"
TIMED = 2048  # test images, of a data set that is not in memory
LOCK = Path(tempfile.gettempdir()) / "blockdrop-benchmark.lock"  # one benchmark at a time on a machine


def headline(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Numbers for `dvc exp show` and MLflow: speed-ups that may be claimed, the others are left out."""
    found: dict[str, float] = {}
    for answer in answers:
        where = f"batch{answer['batch']}_{answer['precision']}"
        found[f"reliable_{where}"] = int(answer["reliable"])
        if answer["reliable"]:
            found[f"speedup_{where}"] = answer["speedup"]
            if answer["share_of_ideal"] is not None:
                found[f"share_of_ideal_{where}"] = answer["share_of_ideal"]
    return found


def main(params: Params) -> None:
    """Write metrics/benchmark.json, and tables and figures in plots/benchmark."""
    device = choose_device()
    print(f"benchmark: on {describe_device(device)}", flush=True)
    with stage_run("benchmark", params.flat()) as mlflow_run:
        full = checkpoint.load(common.PRETRAINED).need_resnet().to(device)
        tuned = checkpoint.load(common.FINETUNED)
        resnet, policy_net = tuned.need_resnet().to(device), tuned.need_policy_net().to(device)
        test = load_split(common.PREPARED, "test", device)
        benchmark = Benchmark(
            Networks(resnet=resnet, policy_net=policy_net, normalisation=tuned.normalisation),
            full=full,
            images=test.subset(TIMED).images,
            cost=measure(resnet, policy_net, test.image_size),
            settings=Settings(**dict(params.benchmark)),
        )
        with (
            exclusive(LOCK, waiting="benchmark: waiting for another one on this machine to end"),
            Steps("benchmark", params.benchmark.seconds) as steps,
        ):
            tables = benchmark.run(lambda line: steps.say(f"benchmark: {line}"), steps.reach)
        machine = describe_machine(device)
        result = {
            "machine": machine,
            "left_out": benchmark.left_out,
            "settings": dataclasses.asdict(benchmark.settings),
            **tables,
        }
        metrics = headline(tables["answers"])
        common.write_json(OUT / "benchmark.json", result)
        common.write_json(common.METRICS / "benchmark.json", {"benchmark": metrics})
        title = f"ResNet-{resnet.depth}, {machine['device']}"
        if any(row["kind"] == "blockdrop" for row in tables["times"]):
            figures.speedups(OUT / "speedups.png", times=tables["times"], title=title)
        if tables["sweep"]:
            figures.break_evens(OUT / "break_evens.png", sweep=tables["sweep"], title=title)
        mlflow_run.log_metrics({f"benchmark.{name}": value for name, value in metrics.items()})
        for file in sorted(OUT.iterdir()):
            mlflow_run.log_artifact(file)


if __name__ == "__main__":
    common.run(main)
