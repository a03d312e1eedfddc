"""The synthetic policy of `research.speed`."""

import torch

from pipeline.models.policy_net import PolicyNet
from research.speed import NORMALISATION, decide_at_random, settle_batch_norm

IMAGES, BLOCKS = 40, 15  # fewer images than the policy network has features


def test_random_policy_keeps_its_ratio_and_is_no_matter_of_rounding():
    torch.manual_seed(0)
    images = torch.randint(256, (IMAGES, 8, 8, 3)).byte()
    policy_net = PolicyNet(num_blocks=BLOCKS, width=16)
    settle_batch_norm(policy_net, images)
    decide_at_random(policy_net, images, keep_ratio=0.75)
    with torch.no_grad():
        logits = policy_net(NORMALISATION(images))  # [M, K]
        in_double = policy_net.double()(NORMALISATION(images).double())
    assert torch.equal(logits > 0, in_double > 0)
    assert torch.allclose(
        (logits > 0).double().mean(dim=0), torch.full((BLOCKS,), 0.75).double(), atol=0.03
    )
    correlation = torch.corrcoef(logits.t().double()) - torch.eye(BLOCKS)
    assert correlation.abs().max() < 0.8
