"""evaluate: what the finetuned pair is worth on the test set, and what looking at images buys.

Shapes: M test images, K blocks.
"""

from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device, describe_device, generator
from pipeline.evaluation import learning_curves, policy_figures
from pipeline.evaluation.dial import DialPoint, dial_points
from pipeline.evaluation.metrics import (
    best_single_policy,
    difficulty_spearman,
    shuffled_accuracy,
    single_policy_candidates,
)
from pipeline.flops import Cost, measure
from pipeline.inference.predict import Predictions, predict, predict_policy
from pipeline.models import checkpoint
from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.results import Evaluation
from pipeline.tracking.runs import stage_run
from stages.support import common
from stages.support.progress import Steps

OUT = common.PLOTS / "evaluate"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The finetuned pair, the pretrained ResNet with every block, and what they see."""

    resnet: ResNet
    policy_net: PolicyNet
    full: ResNet
    normalisation: Normalisation
    classes: tuple[str, ...]
    test: ImageSplit
    validation: ImageSplit
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class DecisionsAndPredictions:
    """What the networks give on the test images."""

    actions: Tensor  # [M, K] bool, the policy's decisions
    dropping: Predictions  # under these decisions
    full: Predictions  # of the pretrained ResNet with every block


def load() -> Trained:
    """The checkpoints and splits, on this machine's device."""
    device = choose_device()
    print(f"evaluate: on {describe_device(device)}", flush=True)
    tuned = checkpoint.load(common.FINETUNED)
    resnet, policy_net = tuned.need_resnet().to(device), tuned.need_policy_net().to(device)
    test = load_split(common.PREPARED, "test", device)
    return Trained(
        resnet=resnet,
        policy_net=policy_net,
        full=checkpoint.load(common.PRETRAINED).need_resnet().to(device),
        normalisation=tuned.normalisation,
        classes=tuned.classes,
        test=test,
        validation=load_split(common.PREPARED, "validation", device),
        cost=measure(resnet, policy_net, test.image_size),
    )


def evaluate(
    params: Params, networks: Trained, steps: Steps
) -> tuple[Evaluation, DecisionsAndPredictions]:
    """The metrics, and the results on the test images that they come from."""
    test, validation, cost = networks.test, networks.validation, networks.cost
    resnet, normalisation = networks.resnet, networks.normalisation
    passes = params.evaluate.shuffles + 4  # over the test images: decisions, three predictions, shuffles
    passes += 0 if networks.policy_net.path_values is None else 2  # the dial
    steps.total(passes * len(test) + (params.evaluate.single_policies + 1) * len(validation))
    test_actions, validation_actions = (
        _decide(networks.policy_net, steps.over(split), normalisation) for split in (test, validation)
    )
    results = _predict(networks, test_actions, steps)
    flops = cost.of(test_actions)  # [M]
    shuffled = shuffled_accuracy(
        resnet,
        steps.over(test, params.evaluate.shuffles),
        test_actions,
        normalisation=normalisation,
        policy_net=networks.policy_net,
        repeats=params.evaluate.shuffles,
        draw=generator(params.seed, "evaluate"),
    )
    single, single_validation, single_test = _best_single_policy(
        networks,
        validation_actions,
        steps,
        budget=float(flops.mean()),
        limit=params.evaluate.single_policies,
    )
    correlation, low, high = difficulty_spearman(
        results.full.losses,
        test_actions.sum(dim=1),
        resamples=params.evaluate.bootstrap,
        seed=params.seed,
    )
    evaluation = Evaluation(
        accuracy=results.dropping.accuracy,
        full_accuracy=results.full.accuracy,
        num_blocks=resnet.num_blocks,
        **policy_statistics(test_actions),
        flops_mean=float(flops.mean()),
        flops_std=float(flops.std(correction=0)),
        full_flops=cost.full,
        flops_saved=1 - float(flops.mean()) / cost.full,
        flops_saved_by_pruning=1 - cost.every_block / cost.full,
        flops_saved_by_dropping=1 - float(flops.mean()) / cost.every_block,
        shuffled_accuracy=shuffled,
        best_single_policy_accuracy=single_test,
        best_single_policy_validation_accuracy=single_validation,
        best_single_policy_blocks=float(single.sum()),
        difficulty_spearman=correlation,
        difficulty_spearman_low=low,
        difficulty_spearman_high=high,
    )
    return evaluation, results


def _predict(networks: Trained, actions: Tensor, steps: Steps) -> DecisionsAndPredictions:
    """Classify the test images under actions [M, K], and with every block of the pretrained ResNet."""
    test, normalisation = networks.test, networks.normalisation
    return DecisionsAndPredictions(
        actions=actions,
        dropping=predict(
            networks.resnet,
            steps.over(test),
            actions,
            normalisation=normalisation,
            policy_net=networks.policy_net,
        ),
        full=predict(networks.full, steps.over(test), normalisation=normalisation),
    )


def _best_single_policy(
    networks: Trained, actions: Tensor, steps: Steps, *, budget: float, limit: int
) -> tuple[Tensor, float, float]:
    """The policy [K] that serves the validation images best, and its accuracy on them and in the test.

    Args:
        actions: of the validation images, [M, K].
        budget: FLOPs per image.
        limit: how many of the policies that the images take are tried.
    """
    resnet, test, validation = networks.resnet, networks.test, networks.validation
    normalisation = networks.normalisation
    answering = networks.policy_net if networks.policy_net.answers else None
    candidates = single_policy_candidates(actions, networks.cost, budget=budget, limit=limit)
    single, accuracy = best_single_policy(
        resnet,
        steps.over(validation, len(candidates)),
        candidates,
        normalisation=normalisation,
        policy_net=answering,
    )
    for_all = single.expand(len(test), -1)  # [M, K]
    on_test = predict(
        resnet, steps.over(test), for_all, normalisation=normalisation, policy_net=answering
    )
    return single, accuracy, on_test.accuracy


def _decide(policy_net: PolicyNet, split: ImageSplit, normalisation: Normalisation) -> Tensor:
    """The most likely actions [M, K] bool."""
    logits = predict_policy(policy_net, split, normalisation=normalisation)
    return greedy_actions(torch.sigmoid(logits))


def draw(networks: Trained, evaluation: Evaluation, results: DecisionsAndPredictions) -> None:
    """The figures of the test images: which blocks run for which classes and which images."""
    test, resnet = networks.test, networks.resnet
    shown = policy_figures.ShownPolicies(
        images=test.image_array(),
        labels=test.labels.cpu().numpy(),
        predicted=results.dropping.classes.numpy(),
        actions=results.actions.numpy().astype(np.bool_),
        losses=results.full.losses.numpy(),
        classes=networks.classes,
        stages=resnet.stages,
        title=(
            f"ResNet-{resnet.depth}: {100 * evaluation.accuracy:.2f} % with "
            f"{evaluation.blocks_mean:.2f} of {resnet.num_blocks} blocks "
            f"(all blocks: {100 * evaluation.full_accuracy:.2f} %)"
        ),
    )
    policy_figures.policy_overview(OUT / "policy.png", shown)
    policy_figures.policies_by_class(OUT / "policies_by_class.png", shown)
    policy_figures.easy_and_hard(OUT / "easy_and_hard.png", shown)


def write_tables(test: ImageSplit, results: DecisionsAndPredictions) -> None:
    """plots/blocks.csv, and a row for each test image with its class, the predicted one, its blocks."""
    keep_ratios = results.actions.double().mean(dim=0).tolist()
    common.write_csv(
        common.PLOTS / "blocks.csv",
        [{"block": block, "keep_ratio": ratio} for block, ratio in enumerate(keep_ratios, start=1)],
    )
    dropping, full = results.dropping, results.full
    columns = (
        test.labels, dropping.classes, dropping.correct, results.actions, full.correct, full.losses,
    )  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
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


def write_dial(networks: Trained, steps: Steps) -> None:
    """plots/evaluate/dial.csv: what the same networks are worth at other gammas."""
    points = dial_points(
        networks.policy_net,
        networks.resnet,
        steps.over(networks.test),
        normalisation=networks.normalisation,
        cost=networks.cost,
    )
    columns = tuple(field.name for field in fields(DialPoint))
    common.write_csv(OUT / "dial.csv", [asdict(point) for point in points], columns=columns)


def draw_learning_curves(num_blocks: int) -> None:
    """The curves of both policy stages; one that was imported has none."""
    curves = {}
    for stage in ("curriculum", "finetune"):
        rows = common.read_csv(common.PLOTS / f"{stage}.csv")
        curves[stage] = [{name: float(text) for name, text in row.items()} for row in rows]
    learning_curves.learning_curves(OUT / "learning_curves.png", **curves, num_blocks=num_blocks)


def main(params: Params) -> None:
    """Write metrics/evaluate.json, plots/blocks.csv and the figures in plots/evaluate."""
    with stage_run("evaluate", params.flat()) as mlflow_run, Steps("evaluate") as steps:
        networks = load()
        evaluation, results = evaluate(params, networks, steps)
        draw(networks, evaluation, results)
        write_tables(networks.test, results)
        write_dial(networks, steps)
        draw_learning_curves(evaluation.num_blocks)
        common.write_json(common.METRICS / "evaluate.json", asdict(evaluation))
        mlflow_run.log_metrics(asdict(evaluation))
        for image in sorted(OUT.iterdir()):
            mlflow_run.log_artifact(image)
    print(
        f"evaluate: accuracy {evaluation.accuracy:.4f} (all blocks {evaluation.full_accuracy:.4f}) "
        f"with {evaluation.blocks_mean:.2f} of {evaluation.num_blocks} blocks, "
        f"{evaluation.flops_saved:.1%} of the FLOPs saved, "
        f"{evaluation.unique_policies:.0f} policies"
    )


if __name__ == "__main__":
    common.run(main)
