"""evaluate: what the finetuned pair is worth on the test set, and what looking at images buys."""

import csv

import torch

from pipeline import checkpoint
from pipeline.cost import measure
from pipeline.data import load_split
from pipeline.evaluation import (
    best_single_policy,
    difficulty_spearman,
    shuffled_accuracy,
    single_policy_candidates,
)
from pipeline.figures import curves, policies
from pipeline.inference import predict, predict_policy
from pipeline.params import Params
from pipeline.policies import greedy_actions, policy_statistics
from pipeline.runtime import choose_device, describe_device, generator
from pipeline.tracking.runs import stage_run
from stages import common

IMAGES = common.PLOTS / "evaluate"


def evaluate(params: Params) -> dict[str, float | None]:
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

    actions, seen = (
        greedy_actions(torch.sigmoid(predict_policy(policy_net, s, normalisation=normalisation)))
        for s in (test, validation)
    )
    found = predict(resnet, test, actions, normalisation=normalisation)
    of_full = predict(full, test, normalisation=normalisation)
    flops = cost.of(actions)
    shuffled = shuffled_accuracy(
        resnet,
        test,
        actions,
        normalisation=normalisation,
        repeats=params.evaluate.shuffles,
        draw=generator(params.seed, "evaluate"),
    )
    candidates = single_policy_candidates(
        seen, cost, budget=float(flops.mean()), limit=params.evaluate.single_policies
    )
    single, single_validation = best_single_policy(
        resnet, validation, candidates, normalisation=normalisation
    )
    single_test = predict(
        resnet, test, single.expand(len(test), -1), normalisation=normalisation
    ).accuracy
    correlation, low, high = difficulty_spearman(
        of_full.losses,
        actions.sum(dim=1),
        resamples=params.evaluate.bootstrap,
        seed=params.seed,
    )
    policies.policy_overview(
        IMAGES / "policy.png",
        actions=actions.numpy(),
        labels=test.labels.cpu().numpy(),
        correct=found.correct.numpy(),
        classes=tuned.classes,
        title=(
            f"ResNet-{resnet.depth}: "
            f"{100 * found.accuracy:.2f} % with {float(actions.sum(dim=1).double().mean()):.2f} of "
            f"{resnet.num_blocks} blocks (all blocks: {100 * of_full.accuracy:.2f} %)"
        ),
    )
    kept = actions.double().mean(dim=0).tolist()
    common.write_csv(
        common.PLOTS / "blocks.csv",
        [{"block": index + 1, "kept_share": share} for index, share in enumerate(kept)],
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


def draw_learning_curves() -> None:
    """The curves of both policy stages, unless one of them was imported."""
    tables = []
    for stage in ("curriculum", "finetune"):
        with (common.PLOTS / f"{stage}.csv").open(encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        tables.append([] if set(rows[0]) == {"epoch"} else rows)
    curves.learning_curves(IMAGES / "learning_curves.png", curriculum=tables[0], finetune=tables[1])


def main(params: Params) -> None:
    """Write metrics/evaluate.json, plots/blocks.csv and the figures in plots/evaluate."""
    with stage_run("evaluate", params.flat()) as mlflow_run:
        metrics = evaluate(params)
        draw_learning_curves()
        common.write_json(common.METRICS / "evaluate.json", metrics)
        mlflow_run.log_metrics(metrics)
        for image in sorted(IMAGES.glob("*.png")):
            mlflow_run.log_artifact(image)
    print(
        f"evaluate: accuracy {metrics['accuracy']:.4f} (all blocks {metrics['full_accuracy']:.4f}) "
        f"with {metrics['blocks_mean']:.2f} of {metrics['num_blocks']} blocks, "
        f"{metrics['flops_saved']:.1%} of the FLOPs saved, "
        f"{metrics['unique_policies']:.0f} policies"
    )


if __name__ == "__main__":
    common.run(main)
