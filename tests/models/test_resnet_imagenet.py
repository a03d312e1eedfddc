"""ResNets for ImageNet: torchvision's numbers, the authors' way to drop a block, their FLOPs."""

import pytest
import torch
import torchvision
from builders import NORMALISATION, small_pair, trained
from torch.nn import functional as F

from pipeline.architectures import stage_sizes
from pipeline.flops import measure
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks, UnavailableError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.models.resnet_imagenet import imagenet_resnet
from pipeline.training import legacy_checkpoints
from pipeline.training.legacy_checkpoints import from_torchvision, stages_of


def small() -> ResNet:
    return trained(imagenet_resnet(depth=26, width=4, num_classes=3), seed=0)


def policy(num_blocks: int) -> PolicyNet:
    made = PolicyNet(num_blocks=num_blocks, depth=10, width=4, family="imagenet", input_size=32)
    return trained(made, seed=1)


@pytest.fixture
def images() -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(256, (6, 64, 64, 3), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("depth", [18, 50])
def test_logits_are_those_of_torchvision(depth):
    torch.manual_seed(0)
    reference = trained(getattr(torchvision.models, f"resnet{depth}")())
    weights = reference.state_dict()
    own = imagenet_resnet(depth=depth)
    own.load_state_dict(from_torchvision(weights, stages_of(weights)))
    inputs = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, found = reference(inputs), own.eval()(inputs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_networks_have_the_weights_of_torchvision(depth):
    with torch.device("meta"):
        reference = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        own = imagenet_resnet(depth=depth).state_dict()
    named = from_torchvision(reference, stages_of(reference))
    assert {name: t.shape for name, t in named.items()} == {name: t.shape for name, t in own.items()}


def test_resnet101_and_blockdrop_cost_what_the_paper_says():
    """2 per multiply-add: 1.56e10 full, 1.25e10 +- 0.04e10 at 24.77 blocks with the policy network."""
    with torch.device("meta"):
        resnet = imagenet_resnet(depth=101)
        policy_net = PolicyNet(num_blocks=33, depth=10, width=64, family="imagenet", input_size=112)
    cost = measure(resnet, policy_net, 224)
    assert cost.full == 15_602_810_880
    assert cost.policy_net == 471_917_568
    at_random = torch.rand(2000, 33, generator=torch.Generator().manual_seed(0)) < 24.77 / 33
    assert cost.of(at_random).mean() == pytest.approx(1.243e10, rel=2e-3)


def test_dropped_projection_gives_negative_numbers_too():
    block = small().flat_blocks()[2]  # the first of the second stage
    x = torch.rand(5, 16, 16, 16)
    rows = torch.tensor([1, 3])
    with torch.no_grad():
        found = block(x, rows)
        shortcut = block.shortcut(x)
        kept = F.relu(shortcut + block.residual(x))
    assert (shortcut < 0).any()
    for row in range(5):
        expected = kept if row in rows else shortcut
        assert torch.allclose(found[row], expected[row], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "precision"), [("gather", "fp32"), ("grouped", "fp32"), ("auto", "bf16")]
)
def test_executors_agree_with_the_network(images, name, precision):
    resnet = small()
    networks = Networks(resnet=resnet, policy_net=policy(8), normalisation=NORMALISATION)
    draw = torch.Generator().manual_seed(3)
    every = torch.ones(8, dtype=torch.bool)
    actions = torch.cat([torch.rand(4, 8, generator=draw) < 0.5, every[None], ~every[None]])
    with torch.no_grad():
        expected = resnet(NORMALISATION(images), actions)
    reference = make_executor(networks, name="masked", precision=precision)
    execute = make_executor(networks, name=name, precision=precision)
    near = {"fp32": 1e-4, "bf16": 0.05}[precision] * float(expected.abs().max())
    for found in (execute(images, actions), reference(images, actions)):
        assert (found.logits - expected).abs().max() < near
    assert torch.equal(execute(images).actions, reference(images).actions) or precision == "bf16"


@pytest.mark.parametrize("of", ["resnet", "policy_net"])
def test_native_says_that_it_can_not_run_these_blocks(of):
    networks = Networks(
        resnet=small() if of == "resnet" else cifar_resnet(depth=8, width=4),
        policy_net=policy(8 if of == "resnet" else 3),
        normalisation=NORMALISATION,
    )
    with pytest.raises(UnavailableError, match="CIFAR's ResNets alone"):
        make_executor(networks, name="native")


def test_checkpoint_brings_back_both_networks(tmp_path):
    made = Checkpoint(
        stage="finetune", resnet=small(), policy_net=policy(8), normalisation=NORMALISATION,
        image_size=64, classes=("a", "b", "c"), metrics={},
    )  # fmt: skip
    checkpoint.save(made, tmp_path)
    found = checkpoint.load(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.need_resnet().eval()(x), made.need_resnet()(x))
        assert torch.equal(found.need_policy_net().eval()(x), made.need_policy_net()(x))


def test_sidecar_of_a_cifar_network_is_written_as_before(tmp_path):
    checkpoint.save(small_pair(classes=("a", "b"), image_size=8), tmp_path)
    assert "family" not in (tmp_path / "model.json").read_text()


def test_file_of_torchvision_is_read_as_plain_weights(tmp_path):
    reference = torchvision.models.resnet18(num_classes=5)
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(reference.state_dict(), path)
    resnet = legacy_checkpoints.load(path).need_resnet(path)
    assert (resnet.family, resnet.depth, resnet.num_classes) == ("imagenet", 18, 5)
    assert torch.equal(resnet.fc.weight, reference.fc.weight)


def test_weights_of_a_depth_that_nobody_has_are_refused(tmp_path):
    weights = torchvision.models.resnet18(num_classes=5).state_dict()
    path = tmp_path / "odd.pth"
    torch.save({name: w for name, w in weights.items() if not name.startswith("layer4.1")}, path)
    with pytest.raises(CheckpointError, match=r"has \[2, 2, 2, 1\] blocks .* torchvision's ResNets"):
        legacy_checkpoints.load(path)


def test_unknown_depth_lists_those_that_there_are():
    with pytest.raises(ValueError, match="depth 32 is none of the family imagenet, which has 10, 14"):
        stage_sizes("imagenet", 32)
