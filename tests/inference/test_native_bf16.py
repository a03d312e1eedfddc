"""The CPU executor in bf16, by AMX and by AVX512_BF16: as near to fp32 as `gather` in bf16."""

import platform

import pytest
import torch
from builders import NORMALISATION, trained

from pipeline.inference import native
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.gather import Gather
from pipeline.inference.masked import Masked
from pipeline.inference.native import Native
from pipeline.inference.threads import NativeThreads
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="bf16 products of x86")
WITHOUT_AMX = ["-march=native", "-mno-amx-bf16", "-mno-amx-tile", "-mprefer-vector-width=512"]


@pytest.fixture(scope="module", params=["AMX", "AVX512_BF16"])
def kernel(request, tmp_path_factory):
    """The one after the other, whichever would be chosen here."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "AVX512_BF16":
            patch.setattr(native, "TUNING", [WITHOUT_AMX])
            patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("builds")))
        native.library.cache_clear()
        try:
            depth = native.library("bf16").depth()
        except UnavailableError as error:
            pytest.skip(str(error))
        if depth != {"AMX": 32, "AVX512_BF16": 2}[request.param]:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param
    native.library.cache_clear()


def make_networks(*, depth=14, width=16, input_size=None) -> Networks:
    torch.manual_seed(depth + width)
    resnet = trained(cifar_resnet(depth=depth, width=width))
    policy_net = trained(PolicyNet(num_blocks=resnet.num_blocks, input_size=input_size))
    return Networks(resnet=resnet, policy_net=policy_net, normalisation=NORMALISATION)


def make_images(count: int, size: int) -> torch.Tensor:
    return torch.randint(256, (count, size, size, 3), generator=torch.Generator().manual_seed(1)).byte()


def make_native(networks: Networks, threads: int) -> Native:
    execute = Native(networks, precision="bf16")
    execute.threads = NativeThreads(threads)
    return execute


POLICIES = {
    "random": lambda b, k: torch.rand(b, k, generator=torch.Generator().manual_seed(3)) < 0.4,
    "all kept": lambda b, k: torch.ones(b, k, dtype=torch.bool),
    "all dropped": lambda b, k: torch.zeros(b, k, dtype=torch.bool),
    "first of stages dropped": lambda b, k: (torch.arange(k) % (k // 3) != 0).expand(b, k),
}


def assert_as_near_as_gather(found, images, actions, networks):
    """Rounding errors are chance, so a little more than gather's would do."""
    expected = Masked(networks)(images, actions).logits
    usual = (Gather(networks, precision="bf16")(images, actions).logits - expected).norm()
    assert (found - expected).norm() <= 1.2 * usual + 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("batch", "threads", "policy"),
    [
        (1, 2, "random"), (9, 1, "random"), (1, 1, "all kept"), (9, 2, "all kept"), (9, 2, "all dropped"),
        (2, 2, "first of stages dropped"),
    ],
)  # fmt: skip
def test_logits_under_given_actions(kernel, batch, threads, policy):
    networks = make_networks()
    images = make_images(batch, 32)
    actions = POLICIES[policy](batch, networks.num_blocks)
    found = make_native(networks, threads)(images, actions)
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.actions, actions)
    assert_as_near_as_gather(found.logits, images, actions, networks)


@pytest.mark.parametrize(
    ("depth", "width", "size"),
    [(8, 4, 8), (8, 4, 12), (8, 8, 16), (14, 12, 20), (8, 32, 8), (8, 48, 16), (32, 16, 32)],
)
def test_shapes(kernel, depth, width, size):
    networks = make_networks(depth=depth, width=width)
    images = make_images(2, size)
    actions = POLICIES["random"](2, networks.num_blocks)
    found = make_native(networks, 3)(images, actions)
    assert_as_near_as_gather(found.logits, images, actions, networks)


@pytest.mark.parametrize("input_size", [None, 8])
@pytest.mark.parametrize("batch", [1, 65])
def test_actions_of_the_policy_network(kernel, batch, input_size):
    networks = make_networks(input_size=input_size)
    images = make_images(batch, 16)
    with torch.no_grad():
        logits = networks.policy_net(NORMALISATION(images))
    assert 0 < (logits >= 0).double().mean() < 1
    execute = make_native(networks, 2)
    found = execute(images)
    differ = found.actions != (logits >= 0)
    assert (logits[differ].abs() < 0.02 * logits.abs().max()).all()
    assert torch.equal(execute(images, found.actions).logits, found.logits)


def test_nothing_of_an_image_is_left_for_the_next(kernel):
    networks = make_networks(width=4)
    images = make_images(33, 12)
    actions = POLICIES["random"](33, networks.num_blocks)
    execute = make_native(networks, 1)
    first = execute(images, actions).logits
    assert torch.equal(execute(images.flip(0), actions.flip(0)).logits.flip(0), first)


def test_normalised_inputs(kernel):
    networks = make_networks()
    images = make_images(3, 16)
    actions = POLICIES["random"](3, networks.num_blocks)
    found = make_native(networks, 2).classify(NORMALISATION(images), actions)
    assert_as_near_as_gather(found, images, actions, networks)


@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (9, 1), (9, 2)])
def test_several_policies_give_what_each_gives_alone(kernel, batch, threads):
    networks = make_networks()
    inputs = NORMALISATION(make_images(batch, 32))
    base = POLICIES["random"](batch, networks.num_blocks)
    policies = base ^ torch.eye(networks.num_blocks).bool()[:, None]
    execute = make_native(networks, threads)
    expected = torch.stack([execute.classify(inputs, actions) for actions in policies])
    assert torch.equal(execute.classify(inputs, policies), expected)


def test_a_cpu_without_bf16_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "TUNING", [[]])
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    native.library.cache_clear()
    with pytest.raises(UnavailableError, match=r"no bf16 instructions|no C\+\+ compiler"):
        Native(make_networks(depth=8, width=4), precision="bf16")
    native.library.cache_clear()
