"""benchmark: what dropping blocks saves in time on this machine, against the fastest full ResNet."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.benchmark import figures
from pipeline.benchmark.candidates import Settings
from pipeline.benchmark.runner import Benchmark
from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.device import choose_device, describe_device, describe_machine
from pipeline.flops import measure
from pipeline.inference.base import Networks
from pipeline.infra.locks import exclusive
from pipeline.models import checkpoint
from pipeline.results import Answer, BenchmarkResult
from pipeline.tracking.runs import stage_run
from stages.support import common
from stages.support.progress import Steps

OUT = common.PLOTS / "benchmark"
TIMED = 2048  # test images, of a data set that is not in memory
LOCK = Path(tempfile.gettempdir()) / "blockdrop-benchmark.lock"  # one benchmark at a time on a machine


def headline(answers: Sequence[Answer]) -> dict[str, float]:
    """Numbers for `dvc exp show` and MLflow: speed-ups that may be claimed, the others are left out."""
    metrics: dict[str, float] = {}
    for answer in answers:
        where, winner = f"batch{answer.batch}_{answer.precision}", answer.winner
        reliable = winner is not None and winner.speedup.reliable
        metrics[f"reliable_{where}"] = int(reliable)
        if winner is not None and reliable:
            metrics[f"speedup_{where}"] = winner.speedup.ratio
            if winner.share_of_ideal is not None:
                metrics[f"share_of_ideal_{where}"] = winner.share_of_ideal
    return metrics


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
            images=test.some(TIMED).images,
            cost=measure(resnet, policy_net, test.image_size),
            settings=Settings(**dict(params.benchmark)),
        )
        with (
            exclusive(LOCK, waiting_message="benchmark: waiting for another one on this machine to end"),
            Steps("benchmark", params.benchmark.seconds) as steps,
        ):
            tables = benchmark.run(lambda line: steps.say(f"benchmark: {line}"), steps.reach)
        result = BenchmarkResult(
            machine=describe_machine(device),
            settings=asdict(benchmark.settings),
            left_out=benchmark.left_out,
            **vars(tables),
        )
        metrics = headline(result.answers)
        common.write_json(OUT / "benchmark.json", asdict(result))
        common.write_json(common.METRICS / "benchmark.json", {"benchmark": metrics})
        title = f"ResNet-{resnet.depth}, {result.machine['device']}"
        if any(row.kind == "blockdrop" for row in result.times):
            figures.speedups(OUT / "speedups.png", times=result.times, title=title)
        if result.sweep:
            figures.break_evens(OUT / "break_evens.png", sweep=result.sweep, title=title)
        mlflow_run.log_metrics({f"benchmark.{name}": value for name, value in metrics.items()})
        for file in sorted(OUT.iterdir()):
            mlflow_run.log_artifact(file)


if __name__ == "__main__":
    common.run(main)
