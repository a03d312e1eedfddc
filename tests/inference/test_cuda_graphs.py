"""The graphs of single images, with calls in place of captured graphs: what runs, where it writes.

What needs a GPU is in test_on_cuda.py.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from executors import POLICIES, make_images, make_networks

from pipeline.benchmark import full_resnet_forms as forms_module
from pipeline.benchmark.full_resnet_forms import WholeGraph, eager, full_resnet_forms, fused
from pipeline.inference.auto import EXECUTORS, make_executor
from pipeline.inference.base import UnavailableError
from pipeline.inference.cuda_graphs import Captures, CudaGraphs
from pipeline.inference.masked import Masked


class Event:
    """In place of CUDA's; on a CPU a copy is done when it is asked for."""

    def record(self):
        pass

    def synchronize(self):
        pass


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

    monkeypatch.setattr(CudaGraphs, "captures", staticmethod(lambda: capture))
    monkeypatch.setattr(forms_module, "Captures", lambda: capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def test_full_networks_copy_nothing_from_the_host(monkeypatch):
    networks, images = make_networks(), make_images(3)
    forms = [form(networks, "fp32") for form in (eager, fused)]
    before = [run(images) for run in forms]
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host"))
    for run, expected in zip(forms, before, strict=True):
        assert torch.equal(run(images), expected)


def test_cpus_have_no_graphs():
    with pytest.raises(UnavailableError, match="CUDA graphs need CUDA, not cpu"):
        make_executor(make_networks(), name="cuda_graphs")


@pytest.mark.parametrize("policy", ["random", "all kept", "first of stages dropped"])
def test_replays_what_the_image_keeps(uncaptured, policy):
    networks = make_networks()
    execute, reference = CudaGraphs(networks), Masked(networks)
    for seed in range(4):  # one after the other through the same buffers
        images = make_images(1, seed=seed)
        kept = POLICIES[policy](1, networks.num_blocks)
        inputs = networks.normalisation(images)
        for actions in (kept, ~kept):
            expected = reference(images, actions).logits
            for logits in (execute(images, actions).logits, execute.classify(inputs, actions)):
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_asks_the_policy_network_and_hands_out_copies(uncaptured):
    networks = make_networks()
    execute, reference = CudaGraphs(networks), Masked(networks)
    inputs = [make_images(1, seed=seed) for seed in range(6)]
    inputs += [make_images(batch, size) for batch, size in ((1, 8), (5, 16), (1, 16), (1, 8))]
    outputs = [execute(images) for images in inputs]
    for images, output in zip(inputs, outputs, strict=True):
        expected = reference(images)
        assert torch.equal(output.actions, expected.actions)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)


def test_the_host_waits_for_the_policy_and_not_for_the_stem(uncaptured, monkeypatch):
    networks = make_networks()
    execute, events = CudaGraphs(networks), []
    monkeypatch.setattr(Event, "record", lambda _: events.append("recorded"))
    monkeypatch.setattr(Event, "synchronize", lambda _: events.append("waited"))
    execute(make_images(1))
    (session,) = execute.sessions.values()

    def telling(name, replay):
        return replay and (lambda: (events.append(name), replay()))

    for name in ("decide", "stem", "head"):
        setattr(session, name, telling(name, getattr(session, name)))
    session.blocks = [tuple(telling("block", replay) for replay in both) for both in session.blocks]
    events.clear()
    execute(make_images(1))
    assert events[:4] == ["decide", "recorded", "stem", "waited"]
    assert set(events[4:-1]) <= {"block"}
    assert events[-1] == "head"
    events.clear()
    execute(make_images(1), torch.ones(1, networks.num_blocks))
    assert events == ["recorded", "stem", "waited", *["block"] * networks.num_blocks, "head"]


def test_graphs_of_a_session_share_pool_and_stream(monkeypatch):
    captured = []

    @contextmanager
    def graph(cuda_graph, **options):
        assert cuda_graph.replay == "replay"
        captured.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(CudaGraphs, "captures", type("Here", (Captures,), {}))  # CPUs are not refused
    networks = make_networks()
    execute = CudaGraphs(networks)
    with torch.no_grad():
        for size in (8, 16):
            execute._session(size, size)
    graphs = 4 + networks.num_blocks + 2  # the first blocks of two stages have one for a drop as well
    assert len(captured) == 2 * graphs
    assert {options["capture_error_mode"] for options in captured} == {"thread_local"}
    for part in (captured[:graphs], captured[graphs:]):
        assert len({options["pool"] for options in part}) == 1
        assert len({options["stream"] for options in part}) == 1
    assert captured[0]["pool"] is not captured[-1]["pool"]  # a session is dropped as a whole


def test_what_is_freed_is_captured_anew(uncaptured):
    execute, images = CudaGraphs(make_networks()), make_images(1)
    before = execute(images)
    execute.free()
    assert not execute.sessions
    assert torch.equal(execute(images).logits, before.logits)


def test_the_whole_network_as_a_graph_for_each_batch_size(uncaptured):
    networks = make_networks()
    run, reference = WholeGraph(networks, "fp32"), fused(networks, "fp32")
    for _ in range(2):
        for batch in (1, 3, 1):
            assert torch.equal(run(make_images(batch)), reference(make_images(batch)))
        assert sorted(run.graphs) == [1, 3]
        run.free()
        assert not run.graphs


def test_no_static_form_has_an_executors_name(monkeypatch):
    """Else the executor's times stand in for the form's: BlockDrop would be its own rival."""
    for name in ("eager", "fused", "compiled", "Captures"):
        monkeypatch.setattr(forms_module, name, lambda *_: None)
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    forms = full_resnet_forms(on_cuda, "fp32", with_compile=True)
    assert len(forms) == 4
    assert not forms.keys() & EXECUTORS.keys()
