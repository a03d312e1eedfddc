"""curriculum: learn the policy with a frozen ResNet, block after block from the output, or import it."""

from pathlib import Path

from pipeline import checkpoint, legacy
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.params import Params
from pipeline.policy_learning import PolicyLearning, PolicyRules
from pipeline.policy_net import PolicyNet
from pipeline.runtime import choose_device, seed_everything
from pipeline.training import make_optimizer
from stages import common, trainer


def import_policy_net(path: Path, num_blocks: int) -> PolicyNet:
    """The policy network of our own or the authors' checkpoint, when it fits the ResNet."""
    if path.is_dir():
        policy_net = checkpoint.load(path).need_policy_net()
    else:
        policy_net = legacy.load(path).need_policy_net(path)
    if policy_net.num_blocks != num_blocks:
        raise CheckpointError(
            f"{path} decides on {policy_net.num_blocks} blocks, but the ResNet has {num_blocks}; "
            "import a policy for this depth, or set resnet.depth to the policy's"
        )
    return policy_net


def main(params: Params) -> None:
    """Write models/curriculum (the policy alone; the ResNet is the one of models/pretrain)."""
    pretrained = checkpoint.load(common.PRETRAINED)
    resnet = pretrained.need_resnet()
    path = trainer.imported(params.curriculum)
    if path is not None:
        policy_net = import_policy_net(path, resnet.num_blocks)
        trainer.write_untrained("curriculum")
        metrics: dict[str, float] = {}
        print(f"curriculum: imported {path}")
    else:
        device = choose_device()
        seed_everything(params.seed, "curriculum")
        policy_net = PolicyNet(
            num_blocks=resnet.num_blocks,
            depth=params.policy_net.depth,
            width=params.policy_net.width,
            input_size=params.policy_net.input_size,
            initial_keep_prob=params.policy_net.initial_keep_prob,
        ).to(device)
        section = params.curriculum
        learner = PolicyLearning(
            resnet.to(device),
            policy_net,
            optimizer=make_optimizer(
                "adam",
                [{"params": list(policy_net.parameters()), "lr": section.lr}],
                weight_decay=section.weight_decay,
            ),
            rules=PolicyRules(
                gamma=section.gamma,
                alpha=section.alpha,
                entropy_weight=section.entropy_weight,
                epochs_per_block=section.epochs_per_block,
            ),
            normalisation=pretrained.normalisation,
            precision=section.precision,
            finetune_resnet=False,
        )
        inputs = [common.PREPARED, common.PRETRAINED]
        metrics = trainer.train("curriculum", learner, params, section, inputs)
    checkpoint.save(
        Checkpoint(
            stage="curriculum",
            resnet=None,
            policy_net=policy_net,
            normalisation=pretrained.normalisation,
            classes=pretrained.classes,
            metrics=metrics,
        ),
        common.POLICY,
    )


if __name__ == "__main__":
    common.run(main)
