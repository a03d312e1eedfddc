"""report: one Markdown page on the experiment, from what the other stages wrote."""

from pathlib import Path
from typing import Any

from pipeline.params import Params
from pipeline.tracking import stage_run
from stages import common

OUT = Path("report")
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
    lines += ["", "Reproduce it with `dvc repro` and the params.yaml of this commit.", ""]
    return "\n".join(lines)


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
    return found


def main(params: Params) -> None:
    """Write report/report.md with its pictures."""
    evaluated = common.read_json(common.METRICS / "evaluate.json")
    baseline = common.read_json(common.METRICS / "baseline.json")
    OUT.mkdir(exist_ok=True)
    with stage_run("report", params.flat()) as mlflow_run:
        for name in ("policy.png", "learning_curves.png"):
            (OUT / name).write_bytes((common.PLOTS / "evaluate" / name).read_bytes())
        path = OUT / "report.md"
        path.write_text(page(params, evaluated, baseline), encoding="utf-8")
        mlflow_run.log_headline(headline(evaluated))  # of cached stages too: their code never ran
        for file in sorted(OUT.iterdir()):
            mlflow_run.log_artifact_to_parent(file)
    print(f"report: {path}")


if __name__ == "__main__":
    common.run(main)
