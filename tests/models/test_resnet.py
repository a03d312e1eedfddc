"""Networks: shapes, and that dropping a block really leaves its shortcut alone."""

import pytest
import torch
from builders import trained
from executors import POLICIES

from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.models.row_ops import kept_rows, put_rows, take_rows


def masked_forward(resnet: ResNet, images: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The definition: every block on every image, the result kept where the action is 1."""
    x = resnet.stem(images)
    for k, block in enumerate(resnet.flat_blocks()):
        x = torch.where(actions[:, k, None, None, None], block(x), block.shortcut(x))
    return resnet.head(x)


@pytest.fixture
def resnet() -> ResNet:
    torch.manual_seed(0)
    return trained(cifar_resnet(depth=20, width=8, num_classes=5), seed=1)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "name", ["random", "all kept", "all dropped", "first of stages dropped", "one image keeps"]
)
def test_running_only_kept_blocks_equals_masking(resnet, images, name):
    actions = POLICIES[name](len(images), 9)
    with torch.no_grad():
        expected = masked_forward(resnet, images, actions)
        found = resnet(images, actions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_masking(resnet, images):
    actions = POLICIES["random"](len(images), 9)
    gradients = []
    for forward in (lambda: resnet(images, actions), lambda: masked_forward(resnet, images, actions)):
        resnet.zero_grad()
        forward().square().sum().backward()
        gradients.append([p.grad.clone() for p in resnet.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_batch_statistics_come_from_the_images_that_run_a_block(resnet, images):
    actions = torch.ones(len(images), 9, dtype=torch.bool)
    actions[6:, 4] = False
    block = resnet.flat_blocks()[4]
    seen = []
    hook = block.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    resnet.train()
    block.bn1.reset_running_stats()
    block.bn1.momentum = 1.0
    resnet(images, actions)
    hook.remove()
    assert len(seen[0]) == 6
    mean = block.conv1(seen[0]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(block.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_a_block_that_nobody_keeps_does_not_run(resnet, images):
    actions = POLICIES["all dropped"](len(images), 9)
    for block in resnet.flat_blocks():
        block.conv1.register_forward_pre_hook(lambda *_: pytest.fail("a dropped block ran"))
    resnet.train()(images, actions)


def test_features_stay_channels_last_when_rows_are_taken():
    x = torch.randn(6, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    rows = torch.tensor([4, 1])
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[rows])
    assert taken.is_contiguous(memory_format=torch.channels_last)
    put = put_rows(x, rows, taken + 1)
    assert torch.equal(put[rows], x[rows] + 1)
    assert torch.equal(put[[0, 2, 3, 5]], x[[0, 2, 3, 5]])


def test_kept_rows_are_those_of_each_block():
    actions = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1]]).bool()
    everyone, nobody, some = kept_rows(actions)
    assert everyone is None
    assert nobody.tolist() == []
    assert some.tolist() == [0, 2]


@pytest.mark.parametrize("depth", [2, 9, 31])
def test_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth {depth} is not 6n\+2.*nearest"):
        cifar_resnet(depth=depth)


def test_actions_of_another_shape_are_refused(resnet, images):
    with pytest.raises(ValueError, match=r"\(13, 8\), expected \(13, 9\)"):
        resnet(images, torch.ones(13, 8))


def test_shortcut_pools_and_appends_zero_channels(resnet):
    shortcut = resnet.flat_blocks()[3].shortcut
    x = torch.rand(2, 8, 16, 16)
    out = shortcut(x)
    assert out.shape == (2, 16, 8, 8)
    torch.testing.assert_close(out[:, :8], torch.nn.functional.avg_pool2d(x, 2))
    assert not out[:, 8:].any()


@pytest.mark.parametrize("input_size", [None, 8])
def test_policy_net_gives_a_logit_for_every_block_near_its_start(input_size):
    torch.manual_seed(0)
    net = PolicyNet(num_blocks=9, width=4, input_size=input_size, initial_keep_prob=0.8).eval()
    net.features.fc.weight.data.zero_()
    logits = net(torch.rand(3, 3, 16, 16))
    assert logits.shape == (3, 9)
    torch.testing.assert_close(torch.sigmoid(logits), torch.full((3, 9), 0.8))


def test_policy_net_sees_the_image_at_its_own_resolution():
    net = PolicyNet(num_blocks=9, width=4, input_size=8)
    seen = []
    net.features.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    net(torch.rand(2, 3, 32, 32))
    assert seen == [8]
