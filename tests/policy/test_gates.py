"""Gates: their gradient is the slope of the loss, and they change nothing."""

import pytest
import torch
from builders import NORMALISATION

from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.policy.gates import forward_with_gates


class PartBlock(torch.nn.Module):
    """So much of the way from what comes out without a block to what comes out with it."""

    def __init__(self, block: torch.nn.Module, fraction: torch.Tensor) -> None:
        super().__init__()
        self.block, self.fraction = block, fraction

    def forward(self, x):
        without = self.block.shortcut(x)
        return without + self.fraction[:, None, None, None] * (self.block(x) - without)


@pytest.mark.parametrize("try_dropped", [False, True])
def test_gates_have_the_slope_of_the_loss(small_resnet, train_split, try_dropped):
    """Against finite differences."""
    small_resnet.double().eval()
    images = NORMALISATION(train_split.images[:4]).double()
    actions = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]).bool()
    logits, gates = forward_with_gates(small_resnet, images, actions, try_dropped=try_dropped)
    torch.testing.assert_close(logits, small_resnet(images, actions))
    logits[:, 0].sum().backward()
    step = 1e-6
    for number in range(small_resnet.num_blocks):
        ends = []
        for change in (-step, step):
            parts = [PartBlock(b, actions[:, k].double()) for k, b in enumerate(small_resnet.blocks)]
            parts[number].fraction += change
            x = small_resnet.stem(images)
            for part in parts:
                x = part(x)
            ends.append(small_resnet.head(x)[:, 0].detach())
        slope = (ends[1] - ends[0]) / (2 * step)
        assert (slope != 0).all()
        expected = slope if try_dropped else slope * actions[:, number]
        torch.testing.assert_close(gates.grad[:, number].double(), expected, rtol=1e-3, atol=1e-6)


def test_trying_a_dropped_block_trains_nothing(train_split):
    torch.manual_seed(0)
    one, other = (cifar_resnet(depth=8, width=4, num_classes=3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    images = NORMALISATION(train_split.images)
    actions = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0)) < 0.5
    actions[:, 1] = False  # nobody runs it
    logits, gates = forward_with_gates(one, images, actions, try_dropped=True)
    logits.square().sum().backward()
    other(images, actions).square().sum().backward()
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == name.startswith("blocks.1.")
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)
    for found, expected in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(found, expected)
    assert (gates.grad != 0).all()
