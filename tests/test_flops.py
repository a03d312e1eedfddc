"""FLOPs against the authors' numbers (2 per multiply-add, convolutions and linear layers)."""

import pytest
import torch

from pipeline.flops import measure
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet


def test_costs_are_those_that_the_authors_report():
    assert measure(cifar_resnet(depth=32), None, 32).full == pytest.approx(1.377e8, rel=5e-4)
    cost = measure(cifar_resnet(depth=110), PolicyNet(num_blocks=54), 32)
    assert cost.full == pytest.approx(5.058e8, rel=5e-4)
    assert cost.policy_net == pytest.approx(2.448e7, rel=5e-4)
    actions = torch.rand(2000, 54, generator=torch.Generator().manual_seed(0)) < 16.93 / 54
    assert 1.80e8 < cost.of(actions).mean() < 1.86e8


def test_cost_is_the_sum_of_what_runs():
    resnet = cifar_resnet(depth=14, width=4, num_classes=7)
    cost = measure(resnet, None, 16)
    conv = lambda i, o, size: 2 * i * o * 9 * size**2  # noqa: E731
    blocks = [
        2 * conv(4, 4, 16), 2 * conv(4, 4, 16),
        conv(4, 8, 8) + conv(8, 8, 8), 2 * conv(8, 8, 8),
        conv(8, 16, 4) + conv(16, 16, 4), 2 * conv(16, 16, 4),
    ]  # fmt: skip
    assert list(cost.blocks) == blocks
    assert cost.always == conv(3, 4, 16) + 2 * 16 * 7
    actions = torch.tensor([[0] * 6, [1] * 6, [1, 0, 0, 1, 0, 0]])
    expected = [cost.always, cost.full, cost.always + blocks[0] + blocks[3]]
    assert cost.of(actions).tolist() == expected


def test_of_a_pruned_network_the_full_cost_is_that_before():
    sizes = {"depth": 8, "width": 4, "num_classes": 7}
    whole = measure(cifar_resnet(**sizes), None, 16)
    resnet = cifar_resnet(**sizes, inner_channels=((3,), (8,), (5,)))
    cost = measure(resnet, PolicyNet(num_blocks=3, width=4), 16)
    conv = lambda i, o, size: 2 * i * o * 9 * size**2  # noqa: E731
    assert list(cost.blocks) == [
        conv(4, 3, 16) + conv(3, 4, 16), whole.blocks[1], conv(8, 5, 4) + conv(5, 16, 4)
    ]  # fmt: skip
    assert cost.full == whole.full == whole.every_block
    assert cost.every_block == whole.full - sum(whole.blocks) + sum(cost.blocks)
    assert cost.of(torch.ones(1, 3)).item() == cost.every_block + cost.policy_net
    assert cost.without_policy_net().full == whole.full


def test_a_smaller_look_costs_less_and_none_costs_nothing():
    resnet = cifar_resnet(depth=32)
    full_look = measure(resnet, PolicyNet(num_blocks=15), 32)
    halved = measure(resnet, PolicyNet(num_blocks=15, input_size=16), 32)
    assert halved.policy_net == pytest.approx(full_look.policy_net / 4, rel=1e-3)
    assert full_look.without_policy_net().always == full_look.always - full_look.policy_net
    assert full_look.full == halved.full


def test_counting_leaves_the_network_as_it_was():
    resnet = cifar_resnet(depth=8)
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    measure(resnet, None, 32)
    assert resnet.training
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet.state_dict().items())
