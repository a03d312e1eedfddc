"""finetune: policy and ResNet jointly, with the gamma on top of params.yaml, or import both."""

from pathlib import Path

from pipeline import checkpoint, legacy
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.params import Params
from pipeline.policy_learning import PolicyLearning, PolicyRules
from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.runtime import choose_device
from pipeline.training import make_optimizer
from stages import common, trainer


def import_both(path: Path) -> tuple[ResNet, PolicyNet]:
    """ResNet and policy network of our own or the authors' finetuned checkpoint."""
    if path.is_dir():
        own = checkpoint.load(path)
        resnet, policy_net = own.need_resnet(), own.need_policy_net()
    else:
        theirs = legacy.load(path)
        resnet, policy_net = theirs.need_resnet(path), theirs.need_policy_net(path)
    if resnet.num_blocks != policy_net.num_blocks:
        raise CheckpointError(
            f"{path}: the policy decides on {policy_net.num_blocks} blocks, its ResNet has "
            f"{resnet.num_blocks}"
        )
    return resnet, policy_net


def main(params: Params) -> None:
    """Write models/finetune (both networks)."""
    pretrained = checkpoint.load(common.PRETRAINED)
    path = trainer.imported(params.finetune)
    if path is not None:
        resnet, policy_net = import_both(path)
        trainer.write_untrained("finetune")
        metrics: dict[str, float] = {}
        print(f"finetune: imported {path}")
    else:
        device = choose_device()
        resnet = pretrained.need_resnet().to(device)
        policy_net = checkpoint.load(common.POLICY).need_policy_net().to(device)
        section = params.finetune
        learner = PolicyLearning(
            resnet,
            policy_net,
            optimizer=make_optimizer(
                "adam",
                [
                    {"params": list(policy_net.parameters()), "lr": section.policy_lr},
                    {"params": list(resnet.parameters()), "lr": section.resnet_lr},
                ],
                weight_decay=section.weight_decay,
            ),
            rules=PolicyRules(
                gamma=params.gamma, alpha=section.alpha, entropy_weight=section.entropy_weight
            ),
            normalisation=pretrained.normalisation,
            precision=section.precision,
            finetune_resnet=True,
        )
        inputs = [common.PREPARED, common.PRETRAINED, common.POLICY]
        metrics = trainer.train("finetune", learner, params, section, inputs)
    checkpoint.save(
        Checkpoint(
            stage="finetune",
            resnet=resnet,
            policy_net=policy_net,
            normalisation=pretrained.normalisation,
            classes=pretrained.classes,
            metrics=metrics,
        ),
        common.FINETUNED,
    )


if __name__ == "__main__":
    common.run(main)
