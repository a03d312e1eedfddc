"""curriculum: learn the policy with a frozen ResNet, block after block from the output, or import it."""

from dataclasses import replace
from pathlib import Path

from pipeline import flops
from pipeline.config import Params
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device, seed_everything
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
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


def learner_of(params: Params, resnet: ResNet, normalisation: Normalisation) -> PolicyLearner:
    """A fresh policy network on the ResNet's device, and how params.yaml has it learnt."""
    section = params.curriculum
    policy_net = PolicyNet(num_blocks=resnet.num_blocks, **dict(params.policy_net))
    policy_net.to(next(resnet.parameters()).device)
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=make_optimizer(
            "adam",
            [{"params": list(policy_net.parameters()), "lr": section.lr}],
            weight_decay=section.weight_decay,
        ),
        objective=PolicyObjective(
            gamma=section.gamma,
            alpha=section.alpha,
            entropy=section.entropy,
            entropy_coef=section.entropy_coef,
            epochs_per_block=section.epochs_per_block,
            estimator=section.estimator,
            num_flips=section.num_flips,
            soft_reward=section.soft_reward,
            block_shares=flops.rewarded_shares(resnet, params.data.image_size, params.block_cost),
        ),
        normalisation=normalisation,
        precision=section.precision,
        distillation=None,
    )


def main(params: Params) -> None:
    """Write models/curriculum (the policy alone; the ResNet is the one of models/pretrain)."""
    pretrained = checkpoint.load(common.PRETRAINED)
    without_resnet = replace(pretrained, stage="curriculum", resnet=None)

    def load(path: Path) -> Checkpoint:
        return replace(without_resnet, policy_net=load_policy_net(path, params, pretrained))

    def build() -> tuple[PolicyLearner, Checkpoint]:
        resnet = pretrained.need_resnet().to(choose_device())
        seed_everything(params.seed, "curriculum")
        learner = learner_of(params, resnet, pretrained.normalisation)
        return learner, replace(without_resnet, policy_net=learner.policy_net)

    training.run("curriculum", params, params.curriculum, load=load, build=build)


if __name__ == "__main__":
    common.run(main, trains=True)
