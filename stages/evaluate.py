"""evaluate: what the finetuned pair is worth on the test set, and what looking at images buys."""

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.data.split import ImageSplit
from pipeline.device import choose_device, describe_device, generator
from pipeline.evaluation import learning_curves, policy_figures
from pipeline.evaluation.metrics import (
    best_single_policy,
    difficulty_spearman,
    shuffled_accuracy,
    single_policy_candidates,
)
from pipeline.flops import measure
from pipeline.inference.predict import Predictions, predict, predict_policy
from pipeline.models import checkpoint
from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.tracking.runs import stage_run
from stages.support import common
from stages.support.progress import Steps

OUT = common.PLOTS / "evaluate"


def evaluate(params: Params, steps: Steps) -> dict[str, float | None]:
    """The metrics, and the figures and tables beside them."""
    device = choose_device()
    print(f"evaluate: on {describe_device(device)}", flush=True)
    pretrained = checkpoint.load(common.PRETRAINED)
    tuned = checkpoint.load(common.FINETUNED)
    full = pretrained.need_resnet().to(device)
    resnet, policy_net = tuned.need_resnet().to(device), tuned.need_policy_net().to(device)
    normalisation = tuned.normalisation
    test, validation = (load_split(common.PREPARED, name, device) for name in ("test", "validation"))
    cost = measure(resnet, policy_net, test.image_size)
    passes = params.evaluate.shuffles + 4  # over the test images: decisions, three predictions, shuffles
    steps.total(passes * len(test) + (params.evaluate.single_policies + 1) * len(validation))

    actions, seen = (
        greedy_actions(
            torch.sigmoid(predict_policy(policy_net, steps.over(s), normalisation=normalisation))
        )
        for s in (test, validation)
    )
    found = predict(resnet, steps.over(test), actions, normalisation=normalisation)
    of_full = predict(full, steps.over(test), normalisation=normalisation)
    flops = cost.of(actions)
    shuffled = shuffled_accuracy(
        resnet,
        steps.over(test, params.evaluate.shuffles),
        actions,
        normalisation=normalisation,
        repeats=params.evaluate.shuffles,
        draw=generator(params.seed, "evaluate"),
    )
    candidates = single_policy_candidates(
        seen, cost, budget=float(flops.mean()), limit=params.evaluate.single_policies
    )
    single, single_validation = best_single_policy(
        resnet, steps.over(validation, len(candidates)), candidates, normalisation=normalisation
    )
    single_test = predict(
        resnet, steps.over(test), single.expand(len(test), -1), normalisation=normalisation
    ).accuracy
    correlation, low, high = difficulty_spearman(
        of_full.losses,
        actions.sum(dim=1),
        resamples=params.evaluate.bootstrap,
        seed=params.seed,
    )
    draw(
        title=(
            f"ResNet-{resnet.depth}: "
            f"{100 * found.accuracy:.2f} % with {float(actions.sum(dim=1).double().mean()):.2f} of "
            f"{resnet.num_blocks} blocks (all blocks: {100 * of_full.accuracy:.2f} %)"
        ),
        test=test,
        actions=actions,
        found=found,
        of_full=of_full,
        classes=tuned.classes,
        stages=resnet.stages,
    )
    write_images(test, actions, found, of_full)
    kept = actions.double().mean(dim=0).tolist()
    common.write_csv(
        common.PLOTS / "blocks.csv",
        [{"block": index + 1, "keep_ratio": share} for index, share in enumerate(kept)],
    )
    return {
        "accuracy": found.accuracy,
        "full_accuracy": of_full.accuracy,
        "num_blocks": resnet.num_blocks,
        **policy_statistics(actions),
        "flops_mean": float(flops.mean()),
        "flops_std": float(flops.std(correction=0)),
        "full_flops": cost.full,
        "flops_saved": 1 - float(flops.mean()) / cost.full,
        "shuffled_accuracy": shuffled,
        "best_single_policy_accuracy": single_test,
        "best_single_policy_validation_accuracy": single_validation,
        "best_single_policy_blocks": float(single.sum()),
        "difficulty_spearman": correlation,
        "difficulty_spearman_low": low,
        "difficulty_spearman_high": high,
    }


def draw(
    *,
    title: str,
    test: ImageSplit,
    actions: Tensor,
    found: Predictions,
    of_full: Predictions,
    classes: tuple[str, ...],
    stages: tuple[int, ...],
) -> None:
    """The figures of the test images: which blocks run for which classes and which images."""
    images, labels = test.image_array(), test.labels.cpu().numpy()
    taken = actions.numpy().astype(np.bool_)
    policy_figures.policy_overview(
        OUT / "policy.png",
        actions=taken,
        labels=labels,
        stages=stages,
        correct=found.correct.numpy(),
        classes=classes,
        title=title,
    )
    policy_figures.policies_by_class(
        OUT / "policies_by_class.png",
        images=images,
        labels=labels,
        actions=taken,
        stages=stages,
        classes=classes,
        title=title,
    )
    policy_figures.easy_and_hard(
        OUT / "easy_and_hard.png",
        images=images,
        labels=labels,
        predicted=found.classes.numpy(),
        actions=taken,
        losses=of_full.losses.numpy(),
        classes=classes,
        title=title,
    )


def write_images(test: ImageSplit, actions: Tensor, found: Predictions, of_full: Predictions) -> None:
    """A row for each test image: what it is, what it was taken for, and which blocks it ran."""
    rows = zip(test.labels.tolist(), found.classes.tolist(), found.correct.tolist(), actions.tolist(),
               of_full.correct.tolist(), of_full.losses.tolist(), strict=True)  # fmt: skip
    table = [
        {
            "image": index,
            "label": label,
            "predicted": predicted,
            "correct": int(correct),
            "blocks": sum(policy),
            "policy": "".join("1" if kept else "0" for kept in policy),
            "full_correct": int(full_correct),
            "full_loss": f"{loss:.6g}",
        }
        for index, (label, predicted, correct, policy, full_correct, loss) in enumerate(rows)
    ]
    common.write_csv(OUT / "images.csv", table)


def draw_learning_curves(num_blocks: int) -> None:
    """The curves of both policy stages; one that was imported has none."""
    tables = []
    for stage in ("curriculum", "finetune"):
        rows = common.read_csv(common.PLOTS / f"{stage}.csv")
        tables.append([{name: float(text) for name, text in row.items()} for row in rows])
    learning_curves.learning_curves(
        OUT / "learning_curves.png", curriculum=tables[0], finetune=tables[1], num_blocks=num_blocks
    )


def main(params: Params) -> None:
    """Write metrics/evaluate.json, plots/blocks.csv and the figures in plots/evaluate."""
    with stage_run("evaluate", params.flat()) as mlflow_run, Steps("evaluate") as steps:
        metrics = evaluate(params, steps)
        draw_learning_curves(int(metrics["num_blocks"] or 0))
        common.write_json(common.METRICS / "evaluate.json", metrics)
        mlflow_run.log_metrics(metrics)
        for image in sorted(OUT.iterdir()):
            mlflow_run.log_artifact(image)
    print(
        f"evaluate: accuracy {metrics['accuracy']:.4f} (all blocks {metrics['full_accuracy']:.4f}) "
        f"with {metrics['blocks_mean']:.2f} of {metrics['num_blocks']} blocks, "
        f"{metrics['flops_saved']:.1%} of the FLOPs saved, "
        f"{metrics['unique_policies']:.0f} policies"
    )


if __name__ == "__main__":
    common.run(main)
