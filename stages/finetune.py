"""finetune: policy and ResNet jointly, with the gamma on top of params.yaml, or import both."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline import checkpoint, cost, legacy
from pipeline.checkpoint import Checkpoint
from pipeline.params import Params
from pipeline.policy_learning import PolicyLearning, PolicyRules
from pipeline.policy_net import PolicyNet
from pipeline.processes import is_main
from pipeline.resnet import ResNet
from pipeline.runtime import choose_device
from pipeline.tensors import Normalisation
from pipeline.training import Metrics, Together, make_optimizer
from stages import common, trainer


def import_both(path: Path, pretrained: Checkpoint, params: Params) -> tuple[ResNet, PolicyNet]:
    """ResNet and policy network of our own or the authors' finetuned checkpoint, when they fit."""
    if path.is_dir():
        own = checkpoint.load(path)
        trainer.require_same(
            path, "input normalisation and list of classes",
            (own.normalisation, own.classes), (pretrained.normalisation, pretrained.classes),
            "import for pretrain the ResNet that it was finetuned from",
        )  # fmt: skip
        trainer.require_same_image_size(path, own, params)
        resnet, policy_net = own.need_resnet(), own.need_policy_net()
    else:
        theirs = legacy.load(path)
        resnet, policy_net = theirs.need_resnet(path), theirs.need_policy_net(path)
    before = pretrained.need_resnet()
    trainer.require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (before.family, before.depth, before.width, before.num_classes),
        "import for pretrain the ResNet that it was finetuned from",
    )  # fmt: skip
    trainer.require_same(
        path, "policy's number of blocks", policy_net.num_blocks, resnet.num_blocks,
        "its two networks do not belong together; take another file",
    )  # fmt: skip
    trainer.require_same_policy_net(path, policy_net, params)
    return resnet, policy_net


def learner_of(
    params: Params, resnet: ResNet, policy_net: PolicyNet, normalisation: Normalisation
) -> PolicyLearning:
    """How params.yaml has both networks learn; the ResNet as it is now is its own teacher."""
    section = params.finetune
    learning = section.policy_epochs or section.epochs - section.hold_epochs
    return PolicyLearning(
        resnet,
        policy_net,
        optimizer=Together(
            make_optimizer(
                "adam",
                [{"params": list(policy_net.parameters()), "lr": section.policy_lr}],
                weight_decay=section.weight_decay,
            ),
            trainer.resnet_optimizer_of(resnet, section),
        ),
        rules=PolicyRules(
            gamma=params.gamma,
            alpha=section.alpha,
            entropy_weight=section.entropy_weight,
            entropy_epochs=learning if section.entropy_schedule == "linear" else None,
            hold_epochs=section.hold_epochs,
            policy_epochs=section.policy_epochs,
            diversity_weight=section.diversity_weight,
            estimator=section.estimator,
            block_shares=cost.rewarded_shares(resnet, params.data.image_size, params.block_cost),
        ),
        normalisation=normalisation,
        precision=section.precision,
        distillation=trainer.distillation_of(resnet, params),
    )


def main(params: Params) -> None:
    """Write models/finetune (both networks)."""
    pretrained = checkpoint.load(common.PRETRAINED)

    def save(resnet: ResNet, policy_net: PolicyNet, metrics: Metrics) -> None:
        made = replace(
            pretrained, stage="finetune", resnet=resnet, policy_net=policy_net, metrics=metrics
        )
        checkpoint.save(made, common.FINETUNED)

    path = trainer.imported(params.finetune)
    if path is not None:
        found = import_both(path, pretrained, params)
        if is_main():
            save(*found, {})
            trainer.record_import("finetune", params, path)
        return
    device = choose_device()
    resnet = pretrained.need_resnet().to(device)
    policy_net = checkpoint.load(common.POLICY).need_policy_net().to(device)
    learner = learner_of(params, resnet, policy_net, pretrained.normalisation)
    inputs = [common.PREPARED, common.PRETRAINED, common.POLICY]
    trainer.train(
        "finetune", learner, params, params.finetune, inputs, partial(save, resnet, policy_net)
    )


if __name__ == "__main__":
    common.run(main, trains=True)
