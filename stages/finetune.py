"""finetune: policy and ResNet jointly, with the gamma on top of params.yaml, or import both."""

from dataclasses import replace
from pathlib import Path

from pipeline import flops
from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.policy.value_learner import ValueLearner
from pipeline.training import legacy_checkpoints
from pipeline.training.optim import ChainedOptimizer, make_optimizer
from stages.support import common, compatibility, recipes, training


def load_pair(path: Path, params: Params, pretrained: Checkpoint) -> tuple[ResNet, PolicyNet]:
    """ResNet and policy network of our own or the authors' finetuned checkpoint, when they fit.

    For a policy between paths the checkpoint may hold the ResNet alone.

    Raises:
        CheckpointError: they can't be read, or were finetuned from another ResNet or on other data.
    """
    origin = "import for pretrain the ResNet that it was finetuned from"
    if path.is_dir():
        imported = checkpoint.load(path)
        compatibility.require_same(
            path, "input normalisation and list of classes",
            (imported.normalisation, imported.classes),
            (pretrained.normalisation, pretrained.classes), origin,
        )  # fmt: skip
        compatibility.require_same_image_size(path, imported, params)
        resnet = imported.need_resnet()
        if imported.policy_net is None and params.policy_net.paths:
            policy_net = fitted_policy_net(params, resnet, pretrained.normalisation)
        else:
            policy_net = imported.need_policy_net()
    else:
        authors = legacy_checkpoints.load(path)
        resnet, policy_net = authors.need_resnet(path), authors.need_policy_net(path)
    before = pretrained.need_resnet()
    compatibility.require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (before.family, before.depth, before.width, before.num_classes), origin,
    )  # fmt: skip
    compatibility.require_same_channels(path, resnet, before)
    compatibility.require_same(
        path, "policy's number of blocks", policy_net.num_blocks, resnet.num_blocks,
        "its two networks do not belong together; take another file",
    )  # fmt: skip
    compatibility.require_same_policy_net(path, policy_net, params)
    if policy_net.path_values is not None:  # one pair serves every gamma
        policy_net.path_values.gamma.fill_(params.gamma)
    return resnet, policy_net


def fitted_policy_net(params: Params, resnet: ResNet, normalisation: Normalisation) -> PolicyNet:
    """The curriculum's policy between paths, its values fitted to a ResNet that comes without a policy.

    So a ResNet that was finetuned under a static rule needs no other training.
    """
    device = choose_device()
    policy_net = checkpoint.load(common.POLICY).need_policy_net().to(device)
    learner = learner_of(params, resnet.to(device), policy_net, normalisation)
    learner.validate(load_split(common.PREPARED, "validation", device))
    return policy_net


def learner_of(
    params: Params, resnet: ResNet, policy_net: PolicyNet, normalisation: Normalisation
) -> PolicyLearner | ValueLearner:
    """How params.yaml has both networks learn; the ResNet as it is now is its own teacher."""
    section, policy = params.finetune, params.finetune_policy
    train_epochs = policy.train_epochs or section.epochs - policy.frozen_epochs
    objective = PolicyObjective(
        gamma=params.gamma,
        alpha=policy.alpha,
        entropy_coef=policy.entropy_coef,
        entropy_epochs=train_epochs if policy.entropy_schedule == "linear" else None,
        frozen_epochs=policy.frozen_epochs,
        train_epochs=policy.train_epochs,
        marginal_entropy_coef=policy.marginal_entropy_coef,
        estimator=policy.estimator,
        block_shares=flops.rewarded_shares(resnet, params.data.image_size, params.block_cost),
    )
    if policy_net.path_values is not None:
        return ValueLearner(
            resnet,
            policy_net,
            optimizer=recipes.resnet_optimizer_of(resnet, section),
            objective=objective,
            normalisation=normalisation,
            image_size=params.data.image_size,
            precision=section.precision,
            distillation=recipes.distillation_of(resnet, params.finetune, params),
        )
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=ChainedOptimizer(
            make_optimizer(
                "adam",
                [{"params": list(policy_net.parameters()), "lr": policy.lr}],
                weight_decay=section.weight_decay,
            ),
            recipes.resnet_optimizer_of(resnet, section),
        ),
        objective=objective,
        normalisation=normalisation,
        precision=section.precision,
        distillation=recipes.distillation_of(resnet, params.finetune, params),
    )


def main(params: Params) -> None:
    pretrained = replace(checkpoint.load(common.PRUNED), stage="finetune")

    def load(path: Path) -> Checkpoint:
        resnet, policy_net = load_pair(path, params, pretrained)
        return replace(pretrained, resnet=resnet, policy_net=policy_net)

    def build() -> tuple[PolicyLearner | ValueLearner, Checkpoint]:
        device = choose_device()
        resnet = pretrained.need_resnet().to(device)
        policy_net = checkpoint.load(common.POLICY).need_policy_net().to(device)
        learner = learner_of(params, resnet, policy_net, pretrained.normalisation)
        return learner, replace(pretrained, policy_net=policy_net)

    training.run("finetune", params, params.finetune, load=load, build=build)


if __name__ == "__main__":
    common.run(main, trains=True)
