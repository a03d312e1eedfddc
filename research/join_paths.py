"""Join trained networks to a policy between paths: nothing is trained, only the values are fitted.

It takes the classifier of policy_pretrain, a ResNet that was finetuned under a static rule, and the
prepared validation images, and writes a pair that `checkpoints.finetune` can name. pretrained/paths was
made so, from pretrained/policy_pretrain and pretrained/static/distribute-9.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import config
from pipeline.data.dataset import load_split
from pipeline.flops import measure, rewarded_shares
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.policy.values import fit_values
from stages import curriculum
from stages.support import common
from tools.command import Parser, command


def add_options(parser: Parser) -> None:
    parser.add_argument("resnet", type=Path, help="a checkpoint with a ResNet")
    parser.add_argument("out", type=Path, help="the folder to write")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Write the pair that params.yaml describes, for its gamma."""
    params = config.load()
    if not params.policy_net.paths:
        raise UserError("policy_net.paths is empty; `make preset NAME=cifar10_paths` names two")
    start = checkpoint.load(arguments.resnet)
    resnet = start.need_resnet()
    policy_net = curriculum.policy_net_of(params, resnet, num_classes=len(start.classes)).eval()
    classifier = checkpoint.load(common.POLICY_PRETRAINED).need_resnet()
    policy_net.features.load_state_dict(classifier.state_dict())
    fit_values(
        policy_net,
        resnet,
        load_split(common.PREPARED, "validation", torch.device("cpu")),
        normalisation=start.normalisation,
        cost=measure(resnet, policy_net, params.data.image_size),
        block_shares=rewarded_shares(resnet, params.data.image_size, params.block_cost),
    )
    assert policy_net.path_values is not None
    policy_net.path_values.gamma.fill_(params.gamma)
    pair = replace(start, stage="finetune", policy_net=policy_net, metrics={})
    checkpoint.save(pair, arguments.out)


if __name__ == "__main__":
    main()
