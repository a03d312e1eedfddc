"""report: one Markdown page on the experiment, from what the other stages wrote."""

from pathlib import Path
from typing import Any

from pipeline.params import Params
from pipeline.runtime import choose_device, describe_machine
from pipeline.tracking.runs import stage_run
from stages import common

OUT = Path("report")
MACHINE = ("device", "processor", "threads")  # what makes times comparable
TRAININGS = ("pretrain", "curriculum", "finetune")


def page(params: Params, evaluated: dict[str, Any], baseline: dict[str, Any]) -> str:
    """The report, from the parameters and the metrics of evaluate and baseline."""
    num_blocks = evaluated["num_blocks"]
    rows = (
        ("ResNet, every block", baseline["accuracy"], num_blocks, baseline["flops"]),
        ("BlockDrop", evaluated["accuracy"], evaluated["blocks_mean"], evaluated["flops_mean"]),
    )
    lines = [
        f"# BlockDrop on {params.data.source}, ResNet-{params.resnet.depth}, gamma {params.gamma:g}",
        "",
        "| network | test accuracy | blocks per image | FLOPs per image |",
        "|---|---|---|---|",
        *(f"| {name} | {100 * a:.2f} % | {b:.2f} | {f:.3g} |" for name, a, b, f in rows),
        "",
        f"BlockDrop saves {100 * evaluated['flops_saved']:.1f} % of the FLOPs, its policy network "
        f"counted, at {100 * (evaluated['accuracy'] - baseline['accuracy']):+.2f} points of accuracy.",
        "",
        "![Which blocks run](policy.png)",
        "",
        "## Does looking at the image pay?",
        "",
        f"- {evaluated['unique_policies']:.0f} different policies, as diverse as "
        f"{evaluated['effective_policies']:.1f} equally frequent ones; "
        f"{evaluated['blocks_mean']:.2f} +- {evaluated['blocks_std']:.2f} blocks per image.",
        f"- With another image's policy the accuracy is {100 * evaluated['shuffled_accuracy']:.2f} % "
        f"instead of {100 * evaluated['accuracy']:.2f} %.",
        "- The best single policy for all images at no more FLOPs, chosen on the validation images, "
        f"reaches {100 * evaluated['best_single_policy_accuracy']:.2f} % with "
        f"{evaluated['best_single_policy_blocks']:.0f} blocks.",
        f"- {_difficulty(evaluated)}",
        "",
        "## Training",
        "",
        "![Learning curves](learning_curves.png)",
        "",
        "| stage | seconds | training images per second | on |",
        "|---|---|---|---|",
    ]
    for stage in TRAININGS:
        times = common.read_json(common.METRICS / "times" / f"{stage}.json")
        if times["seconds"] is None:
            lines.append(f"| {stage} | imported | | |")
        else:
            rate, device = times["images_per_second"], times["device"]
            lines.append(f"| {stage} | {times['seconds']:.0f} | {rate:.0f} | {device} |")
    lines += ["", *timing(common.read_json(common.PLOTS / "benchmark/benchmark.json"))]
    lines += ["", "Reproduce it with `dvc repro` and the params.yaml of this commit.", ""]
    return "\n".join(lines)


def timing(benchmark: dict[str, Any]) -> list[str]:
    """The benchmark's section: when BlockDrop is beneficial, in words and in a table."""
    measured = benchmark["machine"]
    here = describe_machine(choose_device())
    lines = [
        "## Does it pay in time?",
        "",
        f"Measured on {measured['device']} ({measured['processor']}), against the full ResNet in its "
        "fastest form here, policy network and normalisation included.",
        "",
    ]
    if {k: measured[k] for k in MACHINE} != {k: here[k] for k in MACHINE}:
        lines += [
            f"**Another machine than this one** ({here['device']}, {here['processor']}): these times "
            "come from DVC's cache. `make benchmark` measures here.",
            "",
        ]
    lines += [*(f"- {beneficial(answer)}" for answer in benchmark["answers"]), ""]
    lines += [
        "Kept shares are of synthetic policies, which run the policy network as a call of its own: at "
        "small batches that costs more than it does inside, so there the true share is higher.",
        "",
    ]
    lines += ["![Speed-up by batch size](speedups.png)", ""]
    if benchmark["sweep"]:
        lines += ["![Time by kept share of the blocks](break_evens.png)", ""]
    lines += [
        "| batch | precision | executor | ms | images per second | times as fast | share of what FLOPs "
        "promise | best static form | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for answer in benchmark["answers"]:
        if "executor" in answer:
            rate = 1000 * answer["batch"] / answer["milliseconds"]
            lines.append(
                f"| {answer['batch']} | {answer['precision']} | {answer['executor']} "
                f"| {answer['milliseconds']:.2f} | {rate:,.0f} | {_claim(answer)} "
                f"| {100 * answer['share_of_ideal']:.0f} % of {answer['ideal']:.2f} "
                f"| {answer['best_static']} | {answer['static_milliseconds']:.2f} |"
            )
    if benchmark["left_out"]:
        lines += ["", "Left out here: " + _left_out(benchmark["left_out"]) + "."]
    return lines


def beneficial(answer: dict[str, Any]) -> str:
    """One answer of the benchmark in words."""
    where = f"Batch {answer['batch']}, {answer['precision']}"
    if "executor" not in answer:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed."
    if not answer["reliable"]:
        return f"{where}: too noisy here to say (nothing is claimed)."
    ratio, low, high = (answer[k] for k in ("speedup", "speedup_low", "speedup_high"))
    interval = f"{ratio:.2f} times as fast (95 % interval {low:.2f} to {high:.2f})"
    if low > 1:
        said = f"{where}: beneficial, {interval}"
    elif high < 1:
        said = f"{where}: **not** beneficial, {interval}"
    else:
        said = f"{where}: no difference, {interval}"
    shares = [
        f"{100 * answer[f'break_even_{variant}']:.0f} % with {variant} different policies"
        for variant in ("few", "many")
        if answer.get(f"break_even_{variant}") is not None
    ]
    if shares:
        said += f"; it would be up to a kept share of {', '.join(shares)}"
    if answer["faster_than"]:
        said += f"; no slower than a full {answer['faster_than']}"
    return said + "."


def _claim(answer: dict[str, Any]) -> str:
    if not answer["reliable"]:
        return "too noisy"
    return f"{answer['speedup']:.2f} ({answer['speedup_low']:.2f} to {answer['speedup_high']:.2f})"


def _left_out(reasons: dict[str, str]) -> str:
    return "; ".join(f"{what} ({why})" for what, why in reasons.items())


def _difficulty(evaluated: dict[str, Any]) -> str:
    value = evaluated["difficulty_spearman"]
    if value is None:
        return "Every image takes the same number of blocks, so effort can't follow difficulty."
    low, high = evaluated["difficulty_spearman_low"], evaluated["difficulty_spearman_high"]
    return (
        "Rank correlation of the full network's loss and the number of blocks: "
        f"{value:+.3f} (95 % interval {low:+.3f} to {high:+.3f})."
    )


def headline(evaluated: dict[str, Any]) -> dict[str, float | None]:
    """What the parent run shows: evaluate's metrics as they are, others under their stage's name."""
    found = evaluated | common.read_json(common.METRICS / "prepare.json")
    baseline = common.read_json(common.METRICS / "baseline.json")
    found |= {f"baseline.{name}": value for name, value in baseline.items()}
    for stage in TRAININGS:
        metrics = common.read_json(common.METRICS / f"{stage}.json")[stage]
        times = common.read_json(common.METRICS / "times" / f"{stage}.json")
        found |= {f"{stage}.{name}": value for name, value in metrics.items()}
        found[f"{stage}.seconds"] = times["seconds"]
    timed = common.read_json(common.METRICS / "benchmark.json")["benchmark"]
    return found | {f"benchmark.{name}": value for name, value in timed.items()}


def main(params: Params) -> None:
    """Write report/report.md with its pictures."""
    evaluated = common.read_json(common.METRICS / "evaluate.json")
    baseline = common.read_json(common.METRICS / "baseline.json")
    OUT.mkdir(exist_ok=True)
    pictures = [common.PLOTS / "evaluate" / name for name in ("policy.png", "learning_curves.png")]
    pictures += sorted((common.PLOTS / "benchmark").glob("*.png"))
    with stage_run("report", params.flat()) as mlflow_run:
        for picture in pictures:
            (OUT / picture.name).write_bytes(picture.read_bytes())
        path = OUT / "report.md"
        path.write_text(page(params, evaluated, baseline), encoding="utf-8")
        mlflow_run.log_headline(headline(evaluated))  # of cached stages too: their code never ran
        for file in sorted(OUT.iterdir()):
            mlflow_run.log_artifact_to_parent(file)
    print(f"report: {path}")


if __name__ == "__main__":
    common.run(main)
