"""`onednn` gives what `masked` gives on ImageNet's ResNets, or says why it can't run."""

import gc
import importlib.metadata
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from builders import NORMALISATION, make_split, trained

from pipeline.inference import auto as auto_module
from pipeline.inference import onednn
from pipeline.inference.auto import GatherOrGrouped, make_executor
from pipeline.inference.base import Networks, UnavailableError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.models.resnet_imagenet import imagenet_resnet

needs_onednn = pytest.mark.slow  # `make slow` installs it
SIZE = 65  # odd, so that every stride rounds


@pytest.fixture(scope="module", params=[18, 50])  # basic blocks and bottlenecks
def networks(request) -> Networks:
    resnet = trained(imagenet_resnet(depth=request.param, width=8, num_classes=5), seed=0)
    policy_net = PolicyNet(
        num_blocks=resnet.num_blocks, family="imagenet", depth=10, width=8, input_size=32
    )
    return Networks(resnet=resnet, policy_net=trained(policy_net, seed=1), normalisation=NORMALISATION)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_split(11, size=SIZE).images


def installed(networks: Networks, precision: str = "fp32") -> onednn.OneDnn:
    try:
        return onednn.OneDnn(networks, precision=precision)
    except UnavailableError as error:
        pytest.skip(str(error))


def policies(batch: int, blocks: int) -> torch.Tensor:
    """Random ones, and one each that keeps all, drops all, and drops only the first blocks of stages."""
    actions = torch.rand(batch, blocks, generator=torch.Generator().manual_seed(3)) < 0.5
    actions[:2] = torch.tensor([True, False])[:, None][: min(2, batch)]
    return actions


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 7, 11])
def test_logits_and_decisions_are_those_of_masked(batch, threads, networks, images):
    execute = installed(networks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch_images, actions = images[:batch], policies(batch, networks.num_blocks)
        reference = make_executor(networks, name="masked")
        for given in (actions, None, torch.ones_like(actions)):
            found, expected = execute(batch_images, given), reference(batch_images, given)
            assert torch.equal(found.actions, expected.actions)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_onednn
def test_bf16_is_near(networks, images):
    execute = installed(networks, "bf16")
    actions = policies(len(images), networks.num_blocks)
    expected = make_executor(networks, name="masked")(images, actions).logits
    error = (execute(images, actions).logits - expected).abs().max()
    assert error < 0.05 * expected.abs().max()


@needs_onednn
def test_a_call_leaves_the_next_ones_alone(networks, images):
    """Plans keep their memory: an image must find nothing of those before it."""
    execute = installed(networks)
    actions = policies(len(images), networks.num_blocks)
    first = execute(images, actions).logits.clone()
    for size in (32, SIZE):
        execute(make_split(3, size=size).images)
    assert torch.equal(execute(images, actions).logits, first)


@needs_onednn
def test_memory_is_freed_at_once(networks, images):
    """Without the garbage collector, which counts objects and not what they hold."""
    execute = installed(networks)
    execute(images)
    plans = [weakref.ref(plan) for idle in execute.network.idle.values() for plan in idle]
    gc.disable()
    try:
        execute.free()
        assert all(plan() is None for plan in plans)
        execute(images)
        network = weakref.ref(execute.network)
        del execute
        assert network() is None
    finally:
        gc.enable()


@needs_onednn
def test_several_threads_may_call_at_once(networks, images):
    execute = installed(networks)
    actions = policies(len(images), networks.num_blocks)
    expected = execute(images, actions).logits
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(execute, images, actions) for _ in range(16)]
        for call in calls:
            torch.testing.assert_close(call.result().logits, expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_auto_takes_it_for_large_images_alone(networks, monkeypatch):
    installed(networks)
    execute = GatherOrGrouped(networks)
    ran = []
    monkeypatch.setattr(
        onednn.OneDnn, "_classify", lambda self, inputs, actions: ran.append(len(inputs)) or inputs
    )
    for size in (64, 128):
        execute(make_split(3, size=size).images)
    assert ran == [3]


@pytest.mark.parametrize("count", range(1, 30))
def test_parts_of_a_group_are_few_shapes(count):
    sizes = list(onednn._sizes(count))
    assert sum(sizes) == count
    assert set(sizes) <= {1, 2, 4}


@needs_onednn
def test_cifars_resnets_are_refused():
    networks = Networks(
        resnet=cifar_resnet(depth=8, width=4), policy_net=None, normalisation=NORMALISATION
    )
    installed(Networks(resnet=imagenet_resnet(depth=18, width=4, num_classes=3), policy_net=None,
                       normalisation=NORMALISATION))  # fmt: skip
    with pytest.raises(UnavailableError, match="networks of ImageNet alone, not CIFAR's"):
        onednn.OneDnn(networks)


def test_a_library_with_threads_of_its_own_is_refused():
    own = SimpleNamespace(omp_get_max_threads=lambda: 0)
    assert not onednn._has_threads_of_torch(own)


def test_without_the_library_it_says_how_to_install_it(networks, images, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(onednn, "library", onednn.library.__wrapped__)
    auto_module._warn_once.cache_clear()
    with pytest.raises(UnavailableError, match="is not installed; `make peers` installs it"):
        make_executor(networks, name="onednn")
    actions = policies(3, networks.num_blocks)
    large = make_split(3, size=128).images
    found = GatherOrGrouped(networks)(large, actions).logits
    expected = make_executor(networks, name="masked")(large, actions).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "without the executor onednn" in capsys.readouterr().err
