"""curriculum: learn the policy with a frozen ResNet, block after block from the output, or import it."""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline import flops
from pipeline.config import Params
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device, seed_everything
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.policy.value_learner import ValueLearner
from pipeline.static_policies import static_rule
from pipeline.training import legacy_checkpoints
from pipeline.training.optim import make_optimizer
from stages.support import common, compatibility, training


def load_policy_net(path: Path, params: Params, pretrained: Checkpoint) -> PolicyNet:
    """The policy network of our own or the authors' checkpoint, when it fits the pretrained ResNet.

    Raises:
        CheckpointError: it can't be read, or was trained for another ResNet or data set.
    """
    if path.is_dir():
        imported = checkpoint.load(path)
        compatibility.require_same(
            path, "input normalisation", imported.normalisation, pretrained.normalisation,
            "import a policy that was trained with this ResNet",
        )  # fmt: skip
        compatibility.require_same_image_size(path, imported, params)
        policy_net = imported.need_policy_net()
    else:
        policy_net = legacy_checkpoints.load(path).need_policy_net(path)
    compatibility.require_same(
        path, "number of blocks", policy_net.num_blocks, pretrained.need_resnet().num_blocks,
        "import a policy for this ResNet, or set resnet.depth to the policy's",
    )  # fmt: skip
    compatibility.require_same_policy_net(path, policy_net, params)
    return policy_net


def policy_net_of(params: Params, resnet: ResNet, *, num_classes: int) -> PolicyNet:
    """The policy network that params.yaml describes, its weights drawn."""
    section = params.policy_net
    values = None
    if section.paths:
        distribute = [static_rule("distribute", kept, resnet.stages) for kept in section.paths]
        masks = [rule(torch.zeros(1, resnet.num_blocks))[0].tolist() for rule in distribute]
        paths = ["".join("1" if kept else "0" for kept in mask) for mask in masks]
        values = PathValues(paths, num_classes=num_classes)
    return PolicyNet(
        num_blocks=resnet.num_blocks, path_values=values, **section.model_dump(exclude={"paths"})
    )


def learner_of(
    params: Params, resnet: ResNet, policy_net: PolicyNet, normalisation: Normalisation
) -> PolicyLearner | ValueLearner:
    """How params.yaml has the policy learnt."""
    section = params.curriculum
    objective = PolicyObjective(
        gamma=section.gamma,
        alpha=section.alpha,
        entropy=section.entropy,
        entropy_coef=section.entropy_coef,
        epochs_per_block=section.epochs_per_block,
        estimator=section.estimator,
        num_flips=section.num_flips,
        soft_reward=section.soft_reward,
        block_shares=flops.rewarded_shares(resnet, params.data.image_size, params.block_cost),
    )
    optimizer = make_optimizer(
        "adam",
        [{"params": list(policy_net.parameters()), "lr": section.lr}],
        weight_decay=section.weight_decay,
    )
    if policy_net.path_values is not None:
        return ValueLearner(
            resnet,
            policy_net,
            optimizer=optimizer,
            objective=objective,
            normalisation=normalisation,
            image_size=params.data.image_size,
            precision=section.precision,
            distillation=None,
        )
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=optimizer,
        objective=objective,
        normalisation=normalisation,
        precision=section.precision,
        distillation=None,
    )


def main(params: Params) -> None:
    """Write models/curriculum (the policy alone; the ResNet is the one of models/prune).

    A policy between paths needs no curriculum: its values are fitted on validation images, at once.
    """
    pretrained = checkpoint.load(common.PRUNED)
    without_resnet = replace(pretrained, stage="curriculum", resnet=None)

    def load(path: Path) -> Checkpoint:
        return replace(without_resnet, policy_net=load_policy_net(path, params, pretrained))

    def build() -> tuple[PolicyLearner | ValueLearner, Checkpoint]:
        device = choose_device()
        resnet = pretrained.need_resnet().to(device)
        seed_everything(params.seed, "curriculum")
        policy_net = policy_net_of(params, resnet, num_classes=len(pretrained.classes))
        if params.policy_net.paths:
            classifier = checkpoint.load(common.POLICY_PRETRAINED).need_resnet()
            policy_net.features.load_state_dict(classifier.state_dict())
        learner = learner_of(params, resnet, policy_net.to(device), pretrained.normalisation)
        return learner, replace(without_resnet, policy_net=policy_net)

    section = params.curriculum
    if params.policy_net.paths:
        section = section.model_copy(update={"epochs": 0})
    training.run("curriculum", params, section, load=load, build=build)


if __name__ == "__main__":
    common.run(main, trains=True)
