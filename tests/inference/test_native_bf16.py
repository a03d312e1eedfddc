"""The CPU executor in bf16, by AMX and by AVX512_BF16: as near to fp32 as `gather` in bf16."""

import platform

import pytest
import torch
from builders import NORMALISATION
from executors import POLICIES, make_images, make_networks

from pipeline.inference import native
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.gather import Gather
from pipeline.inference.masked import Masked
from pipeline.inference.native import Native
from pipeline.inference.threads import NativeThreads

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


def make_native(networks: Networks, threads: int) -> Native:
    execute = Native(networks, precision="bf16")
    execute.threads = NativeThreads(threads)
    return execute


def assert_as_near_as_gather(output, images, actions, networks):
    """Rounding errors are chance, so a little more than gather's would do."""
    expected = Masked(networks)(images, actions).logits
    usual = (Gather(networks, precision="bf16")(images, actions).logits - expected).norm()
    assert (output - expected).norm() <= 1.2 * usual + 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("batch", "threads", "policy"),
    [
        (1, 2, "random"), (9, 1, "all kept"), (9, 2, "all dropped"), (2, 2, "first of stages dropped"),
    ],
)  # fmt: skip
def test_logits_under_given_actions(kernel, batch, threads, policy):
    networks, images = make_networks(width=16), make_images(batch, 32)
    actions = POLICIES[policy](batch, networks.num_blocks)
    output = make_native(networks, threads)(images, actions)
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.actions, actions)
    assert_as_near_as_gather(output.logits, images, actions, networks)


@pytest.mark.parametrize(
    ("depth", "width", "size"),
    [(8, 4, 12), (8, 8, 16), (14, 12, 20), (8, 32, 8), (8, 48, 16), (32, 16, 32)],
)
def test_shapes(kernel, depth, width, size):
    networks, images = make_networks(depth=depth, width=width), make_images(2, size)
    actions = POLICIES["random"](2, networks.num_blocks)
    output = make_native(networks, 3)(images, actions)
    assert_as_near_as_gather(output.logits, images, actions, networks)


@pytest.mark.parametrize(("batch", "input_size"), [(1, None), (65, None), (65, 8)])
def test_actions_of_the_policy_network(kernel, batch, input_size):
    networks, images = make_networks(width=16, input_size=input_size), make_images(batch)
    with torch.no_grad():
        logits = networks.policy_net(NORMALISATION(images))
    assert 0 < (logits >= 0).double().mean() < 1
    execute = make_native(networks, 2)
    output = execute(images)
    differ = output.actions != (logits >= 0)
    assert (logits[differ].abs() < 0.02 * logits.abs().max()).all()
    assert torch.equal(execute(images, output.actions).logits, output.logits)


def test_nothing_of_an_image_is_left_for_the_next(kernel):
    networks, images = make_networks(width=4), make_images(33, 12)
    actions = POLICIES["random"](33, networks.num_blocks)
    execute = make_native(networks, 1)
    first = execute(images, actions).logits
    assert torch.equal(execute(images.flip(0), actions.flip(0)).logits.flip(0), first)


def test_normalised_inputs(kernel):
    networks, images = make_networks(width=16), make_images(3)
    actions = POLICIES["random"](3, networks.num_blocks)
    output = make_native(networks, 2).classify(NORMALISATION(images), actions)
    assert_as_near_as_gather(output, images, actions, networks)


@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (9, 1), (9, 2)])
def test_several_policies_give_what_each_gives_alone(kernel, batch, threads):
    networks = make_networks(width=16)
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
