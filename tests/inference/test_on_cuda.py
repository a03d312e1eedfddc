"""What only a GPU can show, which no test elsewhere has shown; passed over where there is none."""

import gc
import threading
from pathlib import Path

import pytest
import torch
from executors import POLICIES, make_images, make_networks

from pipeline.benchmark.runner import Benchmark, Settings
from pipeline.device import choose_device
from pipeline.flops import measure
from pipeline.inference import auto, triton_kernel
from pipeline.inference.auto import Auto
from pipeline.inference.cuda_graphs import CudaGraphs
from pipeline.inference.masked import Masked
from pipeline.inference.triton_kernel import TritonKernel
from pipeline.models import checkpoint
from pipeline.serving.predictor import Predictor

PRETRAINED = Path(__file__).parents[2] / "pretrained/finetune"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No proof and no choice of another test, and fp32 that is fp32."""
    monkeypatch.setattr(triton_kernel, "PROOFS", {})
    monkeypatch.setattr(auto, "CHOICES", {})
    choose_device()


def on_cuda(**options):
    networks = make_networks(**options)
    for network in networks.resnet, networks.policy_net:
        network.to("cuda")
    return networks


def images_of(count, seed=0):
    return make_images(count, seed=seed).to("cuda")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", ["random", "all kept", "first of stages dropped"])
def test_graphs_in_any_order_give_what_masked_gives(policy):
    networks = on_cuda()
    execute, reference = CudaGraphs(networks), Masked(networks)
    for seed in range(4):
        images = images_of(1, seed)
        assert torch.equal(execute(images).actions, reference(images).actions)
        actions = POLICIES[policy](1, networks.num_blocks).to("cuda")
        for given in (actions, ~actions):
            close(execute(images, given).logits, reference(images, given).logits)


def test_host_reads_the_policy_while_the_stem_still_runs(monkeypatch):
    execute = CudaGraphs(on_cuda())
    execute(images_of(1))
    (session,) = execute.sessions.values()
    monkeypatch.setattr(session, "stem", lambda: torch.cuda._sleep(2_000_000_000))  # about a second
    done, end = [], session.policy_reader.end

    def look():
        actions = end()
        done.append(torch.cuda.current_stream().query())
        return actions

    monkeypatch.setattr(session.policy_reader, "end", look)
    execute(images_of(1))
    assert done == [False]


def test_graphs_of_a_session_take_one_pool():
    execute = CudaGraphs(on_cuda())
    execute(images_of(1))
    (session,) = execute.sessions.values()
    pools = {tuple(s["segment_pool_id"]) for s in torch.cuda.memory_snapshot()} - {(0, 0)}
    assert tuple(session.capture.pool) in pools
    before = torch.cuda.memory_reserved()
    another = CudaGraphs(on_cuda(depth=32))  # 15 blocks in place of 6
    another(images_of(1))
    segments = [
        s
        for s in torch.cuda.memory_snapshot()
        if tuple(s["segment_pool_id"]) == tuple(next(iter(another.sessions.values())).capture.pool)
    ]
    assert len(segments) <= 4, before


def test_capture_beside_a_thread_that_pins_memory():
    stop, failures, held = threading.Event(), [], []

    def pin():
        size = 2**16
        while not stop.is_set() and size < 2**26:
            try:
                held.append(
                    torch.empty(size, pin_memory=True)
                )  # larger than all before: no block serves
            except Exception as error:
                failures.append(error)
                return
            size += 2**16

    networks = on_cuda()
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(3):
            close(CudaGraphs(networks)(images_of(1)).logits, Masked(networks)(images_of(1)).logits)
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_graphs_outlive_those_of_another_executor():
    networks = on_cuda()
    execute, other = CudaGraphs(networks), CudaGraphs(networks)
    before = execute(images_of(1)).logits
    other(images_of(1))
    del other
    gc.collect()
    torch.cuda.empty_cache()
    taken = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(execute(images_of(1)).logits, before)
    assert all(bool(part.isnan().all()) for part in taken)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_triton_proves_itself_once(precision, monkeypatch):
    networks = on_cuda()
    TritonKernel(networks, precision=precision)
    assert list(triton_kernel.PROOFS.values()) == [""]
    monkeypatch.setattr(triton_kernel, "_in_float64", lambda _: pytest.fail("a second proof"))
    execute = TritonKernel(networks, precision=precision)
    output = execute(images_of(33))
    expected = Masked(networks)(images_of(33), output.actions)
    assert (output.logits - expected.logits).abs().max() < 0.05 * expected.logits.abs().max()


def test_auto_races_once_and_repeats_itself(monkeypatch):
    networks = on_cuda()
    first = [Auto(networks)(images_of(batch)).logits for batch in (1, 64)]
    assert len(auto.CHOICES) == 2
    monkeypatch.setattr(Auto, "_seconds", lambda *_: pytest.fail("a second race"))
    again = [Auto(networks)(images_of(batch)).logits for batch in (1, 64)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_benchmark_has_everybodys_times_and_memory():
    networks = on_cuda()
    benchmark = Benchmark(
        networks,
        full=networks.resnet,
        images=images_of(64),
        cost=measure(networks.resnet, networks.policy_net, 16),
        settings=Settings(
            batch_sizes=[1, 32], precisions=["fp32"], keep_ratios=[0.0, 1.0], distinct_policies=20,
            executors=["masked", "gather", "cuda_graphs", "triton"], sole_depths=[8], rounds=5,
            seconds=0.0, with_compile=False,
        ),
    )  # fmt: skip
    rows = benchmark.run(print).times
    kinds = {row.candidate: row.kind for row in rows}
    assert kinds["whole graph"] == "full"
    assert kinds["cuda_graphs"] == "blockdrop"
    assert all(row.peak_mib > 0 for row in rows)
    assert all(row.agreement.agrees for row in rows if row.kind == "blockdrop")
    for row in rows:
        if row.candidate == "triton":
            execute = TritonKernel(networks)
            execute(images_of(row.batch))
            space = execute.resnet.space(16, 16, min(row.batch, execute.programs))
            assert row.peak_mib >= space.nbytes / 2**20


def test_unlike_images_are_told_on_the_device_of_the_networks():
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    images[:4] = images[:4, :1, :1]  # plain
    on_cpu = Predictor(checkpoint.load(PRETRAINED))
    moved = Predictor(checkpoint.load(PRETRAINED), device=torch.device("cuda"))
    expected = on_cpu.unlike_training(images)
    assert expected is not None
    assert (moved.unlike_training(images) == expected).all()
