"""The graphs of single images, with calls in place of captured graphs: what runs, where it writes."""

import pytest
import torch
from test_executors import POLICIES, make_images, make_networks

from pipeline.executors.base import UnavailableError
from pipeline.executors.graphed import Graphed
from pipeline.executors.masked import Masked
from pipeline.executors.static import eager, packed
from pipeline.inference import make_executor


@pytest.fixture
def uncaptured(monkeypatch) -> None:
    """Calls in place of graphs, in which, as while one is captured, no tensor may be made of numbers."""

    def capture(work):
        work()  # warms up, as the true one does

        def replay():
            with monkeypatch.context() as patched:
                patched.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host"))
                work()

        return replay

    monkeypatch.setattr(Graphed, "capture", staticmethod(capture))


def test_full_networks_take_nothing_from_the_host_while_they_are_captured(monkeypatch):
    networks, images = make_networks(), make_images(3)
    forms = [form(networks, "fp32") for form in (eager, packed)]
    before = [run(images) for run in forms]
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host"))
    for run, expected in zip(forms, before, strict=True):
        assert torch.equal(run(images), expected)


def test_cpus_have_no_graphs():
    with pytest.raises(UnavailableError, match="CUDA graphs need CUDA, not cpu"):
        make_executor(make_networks(), name="graphed")


@pytest.mark.parametrize("policy", POLICIES)
def test_replays_what_the_image_keeps(uncaptured, policy):
    networks = make_networks()
    execute, reference = Graphed(networks), Masked(networks)
    for seed in range(4):  # one after the other through the same buffers
        images = make_images(1, seed=seed)
        actions = POLICIES[policy](1, networks.num_blocks)
        found, expected = execute(images, actions), reference(images, actions)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            execute.classify(networks.normalisation(images), actions), expected.logits, atol=1e-4, rtol=0
        )


def test_asks_the_policy_network_and_hands_out_copies(uncaptured):
    networks = make_networks()
    execute, reference = Graphed(networks), Masked(networks)
    found = [execute(make_images(1, seed=seed)) for seed in range(6)]
    for seed, output in enumerate(found):
        expected = reference(make_images(1, seed=seed))
        assert torch.equal(output.actions, expected.actions)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)


def test_other_batches_and_sizes(uncaptured):
    networks = make_networks()
    execute, reference = Graphed(networks), Masked(networks)
    for batch, size in ((1, 8), (5, 16), (1, 16), (1, 8)):
        images = make_images(batch, size)
        torch.testing.assert_close(execute(images).logits, reference(images).logits, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    networks = make_networks()
    for network in networks.resnet, networks.policy_net:
        network.to("cuda")
    images = make_images(1).to("cuda")
    found, expected = Graphed(networks)(images), Masked(networks)(images)
    assert torch.equal(found.actions, expected.actions)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=0)
