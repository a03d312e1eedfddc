"""Pruning: which channels go, and that what is left computes what it should."""

import pytest
import torch
import torch.nn.functional as F
from builders import NORMALISATION, make_split, trained

from pipeline.architectures import kept_channels
from pipeline.data.split import batches
from pipeline.flops import measure
from pipeline.models.build import make_resnet
from pipeline.pruning.allocation import by_sensitivity, uniform
from pipeline.pruning.importance import importances, l1_norms, taylor
from pipeline.pruning.surgery import cut, most_important

NETWORKS = {"cifar": {"depth": 14, "width": 16}, "imagenet": {"depth": 14, "width": 16}}


@pytest.fixture(params=NETWORKS)
def resnet(request):
    """Of CIFAR's basic blocks, and of ImageNet's bottlenecks."""
    torch.manual_seed(0)
    return trained(make_resnet(family=request.param, num_classes=3, **NETWORKS[request.param]), seed=0)


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def masked(resnet, kept):
    """The network with zeros in place of the channels that are not kept."""
    for block, indices in zip(resnet.flat_blocks(), kept, strict=True):
        for (_, bn), channels in zip(block.convolutions()[:-1], indices, strict=True):
            dropped = torch.ones(bn.num_features, dtype=torch.bool)
            dropped[channels] = False
            bn.weight.data[dropped] = bn.bias.data[dropped] = 0.0
    return resnet


@pytest.mark.parametrize(
    ("channels", "ratio", "kept"),
    [
        (16, 0.0, 16), (16, 0.3, 8), (16, 0.9, 8), (32, 0.3, 24), (64, 0.3, 48), (64, 0.5, 32),
        (64, 0.99, 8), (8, 0.5, 8), (4, 0.9, 4), (100, 0.0, 100), (512, 0.3, 360),
    ],
)  # fmt: skip
def test_kept_channels_are_multiples_of_eight_or_all(channels, ratio, kept):
    assert kept_channels(channels, ratio) == kept


def test_ratio_0_is_the_same_network_to_the_bit(resnet, images):
    same = cut(resnet, most_important(l1_norms(resnet), uniform(resnet, 0.0)))
    assert not same.is_pruned
    assert same.state_dict().keys() == resnet.state_dict().keys()
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, resnet.state_dict()[name])
    assert torch.equal(same(images), resnet(images))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("training", [False, True])
def test_pruned_channels_are_masked_channels(resnet, images, ratio, training):
    kept = most_important(l1_norms(resnet), uniform(resnet, ratio))
    pruned = cut(resnet.train(training), kept)
    assert pruned.is_pruned
    assert pruned.training == training
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    actions = torch.rand(4, resnet.num_blocks, generator=torch.Generator().manual_seed(1)) < 0.7
    logits = pruned(images, actions)
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet.state_dict().items())
    torch.testing.assert_close(logits, masked(resnet, kept)(images, actions), atol=1e-5, rtol=1e-5)


def test_pruned_network_learns_as_the_masked_one_does(resnet, images):
    kept = most_important(l1_norms(resnet), uniform(resnet, 0.5))
    pruned, labels = cut(resnet, kept), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(pruned(images), labels).backward()
    F.cross_entropy(masked(resnet, kept)(images), labels).backward()
    torch.testing.assert_close(pruned.fc.weight.grad, resnet.fc.weight.grad)
    for block, before, (first, *_) in zip(pruned.flat_blocks(), resnet.flat_blocks(), kept, strict=True):
        gradient = before.convolutions()[0][0].weight.grad[first]
        torch.testing.assert_close(
            block.convolutions()[0][0].weight.grad, gradient, atol=1e-6, rtol=1e-4
        )


def test_l1_norm_is_that_of_the_filter(resnet):
    block = resnet.flat_blocks()[1]
    for (conv, _), scores in zip(block.convolutions()[:-1], l1_norms(resnet)[1], strict=True):
        assert scores[2] == pytest.approx(conv.weight[2].abs().sum().item())
    (kept,) = most_important([[torch.tensor([3.0, 1.0, 4.0, 1.5])]], [[2]])[0]
    assert kept.tolist() == [0, 2]


def test_taylor_is_the_squared_change_of_the_loss_to_first_order(resnet):
    """By a gate on the batch norm's output that is moved a little."""
    split = make_split(6, size=16)
    parts = batches(torch.arange(6), 3)
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    scores = taylor(resnet.train(), split, parts, NORMALISATION)
    assert resnet.training
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet.state_dict().items())
    assert all(parameter.grad is None for parameter in resnet.parameters())
    resnet.double().eval()
    *_, (_, bn) = resnet.flat_blocks()[2].convolutions()[:-1]
    expected, step, channel = 0.0, 1e-5, 3

    def loss(rows, gate):
        def open_to(module, inputs, output):
            output[:, channel] *= gate

        handle = bn.register_forward_hook(open_to)
        with torch.no_grad():
            logits = resnet(NORMALISATION(split.images[rows]).double())
        handle.remove()
        return F.cross_entropy(logits, split.labels[rows]).item()

    for rows in parts:
        expected += ((loss(rows, 1 + step) - loss(rows, 1 - step)) / (2 * step)) ** 2
    assert scores[2][-1][channel].item() == pytest.approx(expected, rel=1e-3)


def test_taylor_keeps_what_the_loss_needs(images):
    """Filters of the largest norm may do nothing: here their outputs are not read."""
    torch.manual_seed(0)
    resnet = trained(make_resnet(family="cifar", depth=8, width=16, num_classes=3), seed=0)
    first, (second, _) = resnet.flat_blocks()[0].convolutions()
    idle = torch.arange(0, 16, 2)
    first[0].weight.data[idle] *= 100
    second.weight.data[:, idle] = 0.0
    split, draw = make_split(64, size=16), torch.Generator().manual_seed(0)
    kept = {
        criterion: most_important(
            importances(criterion, resnet, split, NORMALISATION, draw), uniform(resnet, 0.5)
        )[0][0].tolist()
        for criterion in ("l1", "taylor")
    }
    assert kept["l1"] == idle.tolist()
    assert kept["taylor"] == (idle + 1).tolist()


def test_sensitivity_spares_the_stage_that_loses_most(resnet):
    def accuracy_of(candidate):
        """Only the first stage's channels count."""
        return sum(sum(block) for block in candidate.inner_channels[: resnet.stages[0]]) / 1000

    scores = l1_norms(resnet)
    channels = by_sensitivity(resnet, scores, ratio=0.3, image_size=16, accuracy_of=accuracy_of)
    first = resnet.stages[0]
    assert channels[:first] == resnet.inner_channels[:first]
    assert channels[first:] != resnet.inner_channels[first:]
    cost, limit = (
        measure(cut(resnet, most_important(scores, each)), None, 16)
        for each in (channels, uniform(resnet, 0.3))
    )
    assert cost.every_block <= limit.every_block


def test_sensitivity_takes_the_ratio_itself_where_no_other_fits():
    torch.manual_seed(0)
    resnet = make_resnet(family="cifar", depth=8, width=64, num_classes=3)
    channels = by_sensitivity(
        resnet, l1_norms(resnet), ratio=0.97, image_size=8, accuracy_of=lambda candidate: 0.5
    )
    assert channels == uniform(resnet, 0.97) == ((8,), (8,), (8,))
