"""finetune: policy and ResNet jointly, with the gamma on top of params.yaml, or import both."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline import flops
from pipeline.config import Params
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device
from pipeline.infra.processes import is_main
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.training import legacy_checkpoints
from pipeline.training.loop import Metrics
from pipeline.training.optim import ChainedOptimizer, make_optimizer
from stages.support import common, training


def import_both(path: Path, pretrained: Checkpoint, params: Params) -> tuple[ResNet, PolicyNet]:
    """ResNet and policy network of our own or the authors' finetuned checkpoint, when they fit."""
    if path.is_dir():
        own = checkpoint.load(path)
        training.require_same(
            path, "input normalisation and list of classes",
            (own.normalisation, own.classes), (pretrained.normalisation, pretrained.classes),
            "import for pretrain the ResNet that it was finetuned from",
        )  # fmt: skip
        training.require_same_image_size(path, own, params)
        resnet, policy_net = own.need_resnet(), own.need_policy_net()
    else:
        theirs = legacy_checkpoints.load(path)
        resnet, policy_net = theirs.need_resnet(path), theirs.need_policy_net(path)
    before = pretrained.need_resnet()
    training.require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (before.family, before.depth, before.width, before.num_classes),
        "import for pretrain the ResNet that it was finetuned from",
    )  # fmt: skip
    training.require_same(
        path, "policy's number of blocks", policy_net.num_blocks, resnet.num_blocks,
        "its two networks do not belong together; take another file",
    )  # fmt: skip
    training.require_same_policy_net(path, policy_net, params)
    return resnet, policy_net


def learner_of(
    params: Params, resnet: ResNet, policy_net: PolicyNet, normalisation: Normalisation
) -> PolicyLearner:
    """How params.yaml has both networks learn; the ResNet as it is now is its own teacher."""
    section, policy = params.finetune, params.finetune_policy
    learning = policy.train_epochs or section.epochs - policy.frozen_epochs
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=ChainedOptimizer(
            make_optimizer(
                "adam",
                [{"params": list(policy_net.parameters()), "lr": policy.lr}],
                weight_decay=section.weight_decay,
            ),
            training.resnet_optimizer_of(resnet, section),
        ),
        objective=PolicyObjective(
            gamma=params.gamma,
            alpha=policy.alpha,
            entropy_coef=policy.entropy_coef,
            entropy_epochs=learning if policy.entropy_schedule == "linear" else None,
            frozen_epochs=policy.frozen_epochs,
            train_epochs=policy.train_epochs,
            marginal_entropy_coef=policy.marginal_entropy_coef,
            estimator=policy.estimator,
            block_shares=flops.rewarded_shares(resnet, params.data.image_size, params.block_cost),
        ),
        normalisation=normalisation,
        precision=section.precision,
        distillation=training.distillation_of(resnet, params),
    )


def main(params: Params) -> None:
    """Write models/finetune (both networks)."""
    pretrained = checkpoint.load(common.PRETRAINED)

    def save(resnet: ResNet, policy_net: PolicyNet, metrics: Metrics) -> None:
        made = replace(
            pretrained, stage="finetune", resnet=resnet, policy_net=policy_net, metrics=metrics
        )
        checkpoint.save(made, common.FINETUNED)

    path = training.imported(params.checkpoints.finetune)
    if path is not None:
        found = import_both(path, pretrained, params)
        if is_main():
            save(*found, {})
            training.record_import("finetune", params, path)
        return
    device = choose_device()
    resnet = pretrained.need_resnet().to(device)
    policy_net = checkpoint.load(common.POLICY).need_policy_net().to(device)
    learner = learner_of(params, resnet, policy_net, pretrained.normalisation)
    inputs = [common.PREPARED, common.PRETRAINED, common.POLICY]
    training.train(
        "finetune", learner, params, params.finetune, inputs, partial(save, resnet, policy_net)
    )


if __name__ == "__main__":
    common.run(main, trains=True)
