"""The Triton executor: its results in Triton's interpreter, and what the compiler makes of it.

The interpreter has to be on before Triton is imported, so one test runs this file again with it on;
then it has other tests. It keeps bf16 as bits that it can't multiply, which `bf16_products` mends.
"""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import executors
import pytest
import torch
from builders import NORMALISATION
from executors import POLICIES
from torch import nn

from pipeline.inference import triton_kernel
from pipeline.inference.base import UnavailableError
from pipeline.inference.masked import Masked
from pipeline.inference.triton_kernel import PIXEL, TritonKernel

triton = pytest.importorskip("triton")
INTERPRETED = not isinstance(triton_kernel._forward, triton.JITFunction)
make_networks = partial(executors.make_networks, depth=8, width=4, policy=False)
make_images = partial(executors.make_images, height=8)
SHARED_PROOFS: dict = {}  # so that most tests need none


@pytest.fixture
def no_proofs(monkeypatch):
    monkeypatch.setattr(triton_kernel, "PROOFS", {})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small proofs, and grids of two programs, so that most batches here are larger."""
    monkeypatch.setattr(TritonKernel, "PROOF_SIDE", 8)
    monkeypatch.setattr(TritonKernel, "PROGRAMS_PER_SM", 2)
    monkeypatch.setattr(triton_kernel, "PROOFS", SHARED_PROOFS)


class TestInInterpreter:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        monkeypatch.setattr(TritonKernel, "SUMS", 1024)  # 64 pixels of the first stage

    @pytest.fixture(autouse=True)
    def bf16_products(self, monkeypatch):
        import numpy as np
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        tl = triton.language
        cast = InterpreterBuilder.cast_impl

        def as_floats(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle.data
            return (handle.data.astype(np.uint32) << 16).view(np.float32)

        def dot(self, a, b, total, *_):
            return TensorHandle(as_floats(a) @ as_floats(b) + total.data, total.dtype.scalar)

        def round_to_even(self, source, kind):
            if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
                return cast(self, source, kind)
            bits = source.data.view(np.uint32)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return TensorHandle(bits.astype(np.uint16), kind.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        monkeypatch.setattr(InterpreterBuilder, "cast_impl", round_to_even)

    @pytest.mark.parametrize(
        ("precision", "depth", "width"), [("fp32", 8, 16), ("fp32", 20, 4), ("bf16", 8, 16)]
    )
    def test_same_logits_as_masked(self, precision, depth, width):
        networks, images = make_networks(depth=depth, width=width), make_images(5)
        each = ("random", "all kept", "all dropped", "first of stages dropped", "only first of stages")
        actions = torch.cat([POLICIES[name](1, networks.num_blocks) for name in each])
        output = TritonKernel(networks, precision=precision)(images, actions)
        expected = Masked(networks)(images, actions).logits
        assert output.logits.dtype == torch.float32
        assert torch.equal(output.actions, actions)
        tolerance = {"fp32": 1e-4, "bf16": 0.02}[precision]
        assert (output.logits - expected).abs().max() < tolerance * expected.abs().max()
        if precision == "bf16":
            assert not torch.allclose(output.logits, expected, rtol=1e-5, atol=0)

    def test_same_logits_as_masked_on_pruned_blocks(self):
        """Of stages with other numbers of inner channels than their own, and than each other."""
        channels = ((8,), (16,), (3,), (30,), (20,), (8,))
        networks = make_networks(depth=14, width=20, inner_channels=channels)
        execute, images = TritonKernel(networks), make_images(3)
        assert execute.resnet.inside == [16, 32, 32]
        assert execute.resnet.channels == [32, 64, 128]
        for policy in ("random", "all kept", "first of stages dropped"):
            actions = POLICIES[policy](3, networks.num_blocks)
            expected = Masked(networks)(images, actions).logits
            output = execute(images, actions).logits
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(("batch", "input_size"), [(1, None), (5, 4)])
    def test_same_actions_as_masked_from_the_policy_network(self, batch, input_size):
        networks, images = make_networks(policy=True, input_size=input_size), make_images(batch)
        execute, reference = TritonKernel(networks), Masked(networks)
        output, expected = execute(images), reference(images)
        assert 0 < expected.actions.double().mean() < 1
        assert torch.equal(output.actions, expected.actions)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
        others = ~expected.actions
        torch.testing.assert_close(
            execute(images, others).logits, reference(images, others).logits, atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize(("width", "depth"), [(20, 16), (8, 256)], ids=["part of a tile", "depth"])
    def test_other_sizes_of_images_and_of_products(self, width, depth, monkeypatch):
        monkeypatch.setattr(TritonKernel, "DEPTH", {"fp32": depth})
        networks, images = make_networks(width=16), make_images(2, width=width)
        output, expected = TritonKernel(networks)(images), Masked(networks)(images)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)

    def test_memory_layouts(self):
        networks, images = make_networks(), make_images(3)
        execute = TritonKernel(networks)
        actions = POLICIES["random"](3, networks.num_blocks)
        expected = Masked(networks)(images, actions).logits
        scattered = make_images(6, height=16, seed=1)
        scattered[::2, ::2, ::2] = images
        taken = scattered[::2, ::2, ::2]
        assert not taken.is_contiguous()
        transposed = actions.t().contiguous().t()
        output = execute(taken, transposed).logits
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
        inputs = NORMALISATION(images)
        for form in (inputs, inputs.contiguous(), inputs.double()):
            output = execute.classify(form, actions)
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)

    def test_borders_stay_zero_and_calls_do_not_depend_on_each_other(self):
        execute = TritonKernel(make_networks(policy=True, width=16))
        images = make_images(3)
        first = execute(images).logits
        execute(make_images(4, seed=1), torch.ones(4, 3))
        assert torch.equal(execute(images).logits, first)
        for network in (execute.resnet, execute.policy_net):
            (space,) = network.spaces.values()
            first, second, third = network.channels
            buffers = [(8, PIXEL), *[(8, first)] * 2, *[(4, second)] * 2, *[(2, third)] * 2]
            start = 0
            for side, channels in buffers:
                stop = start + (side + 2) ** 2 * channels
                buffer = space[:, start:stop].view(-1, side + 2, side + 2, channels).clone()
                assert buffer.flatten(1).any(dim=1).all()  # each program uses its own
                buffer[:, 1:-1, 1:-1, : 3 if channels == PIXEL else None] = 0
                assert not buffer.any()
                start = stop
            assert not space[:, start:].any()
            assert space.shape[1] >= start + third  # where a fourth tap may read

    def test_a_dropped_block_does_not_run(self, monkeypatch):
        """Weights that would show in every logit, in a block that nobody keeps."""
        networks, images = make_networks(), make_images(3)
        actions = torch.tensor([[True, False, True]]).expand(3, 3)
        expected = Masked(networks)(images, actions).logits
        nn.init.constant_(networks.resnet.flat_blocks()[1].conv2.weight, float("nan"))
        monkeypatch.setattr(TritonKernel, "_prove", lambda self: None)
        execute = TritonKernel(networks)
        torch.testing.assert_close(execute(images, actions).logits, expected, atol=1e-4, rtol=0)
        assert execute(images).logits.isnan().all()

    def test_the_proof_has_programs_take_several_images(self, no_proofs, monkeypatch):
        monkeypatch.setattr(TritonKernel, "PROGRAMS_PER_SM", 50)
        execute = TritonKernel(make_networks())
        assert [len(space) for space in execute.resnet.spaces.values()] == [2]
        assert execute.programs == 50

    def test_networks_of_the_same_shapes_are_proved_once(self, no_proofs, monkeypatch):
        proved = []
        monkeypatch.setattr(TritonKernel, "_fault", lambda self: proved.append(1) or "")
        images = make_images(2)
        for seed in (0, 1):  # as before and after an epoch
            networks = make_networks(seed=seed)
            output, expected = TritonKernel(networks)(images), Masked(networks)(images)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
        assert len(proved) == 1
        TritonKernel(make_networks(policy=True))
        TritonKernel(make_networks(policy=True, input_size=4))
        TritonKernel(make_networks(), precision="bf16")
        TritonKernel(make_networks(width=8))
        assert len(proved) == 5

    def test_what_was_disproved_is_not_tried_again(self, no_proofs, monkeypatch):
        tried = []

        def fails(error):
            return lambda *_, **__: tried.append(1) or (_ for _ in ()).throw(error)

        for error, words, tries in (
            (torch.OutOfMemoryError("full"), "no memory is left to prove", 2),
            (RuntimeError("no such target"), "the kernel fails: RuntimeError: no such target", 1),
        ):
            tried.clear()
            monkeypatch.setattr(TritonKernel, "_run", fails(error))
            for _ in range(2):
                with pytest.raises(UnavailableError, match=words):
                    TritonKernel(make_networks())
            assert len(tried) == tries

    def test_scratch_that_is_freed_is_made_anew(self):
        execute = TritonKernel(make_networks(policy=True))
        before = execute(make_images(3)).logits
        execute.free()
        assert not execute.resnet.spaces
        assert not execute.policy_net.spaces
        assert torch.equal(execute(make_images(3)).logits, before)

    def test_sides_that_do_not_halve_twice_are_refused(self):
        with pytest.raises(ValueError, match="10 x 8 pixels, expected multiples of 4"):
            TritonKernel(make_networks())(make_images(2, height=10, width=8))

    def test_too_many_channels_are_refused(self):
        with pytest.raises(UnavailableError, match="256 channels are more than 128"):
            TritonKernel(make_networks(width=33))

    @pytest.mark.parametrize(
        ("precision", "damage"),
        [
            ("fp32", lambda weight, bias: (weight, bias + 0.5)),
            ("bf16", lambda weight, bias: (weight.flip(3), bias)),
            ("bf16", lambda weight, bias: (weight, bias * float("nan"))),
        ],
        ids=["bias", "taps", "nan"],
    )
    def test_a_broken_kernel_is_refused(self, no_proofs, precision, damage, monkeypatch):
        fold = triton_kernel.fold
        monkeypatch.setattr(triton_kernel, "fold", lambda conv, bn: damage(*fold(conv, bn)))
        with pytest.raises(UnavailableError, match="kernel's ResNet disagrees with float64"):
            TritonKernel(make_networks(), precision=precision)

    def test_a_broken_policy_network_is_refused(self, no_proofs, monkeypatch):
        networks = make_networks(policy=True)
        fold, broken = triton_kernel.fold, networks.policy_net.features.flat_blocks()[2].conv1

        def damaged(conv, bn):
            weight, bias = fold(conv, bn)
            return weight, bias + (0.5 if conv is broken else 0)

        monkeypatch.setattr(triton_kernel, "fold", damaged)
        with pytest.raises(UnavailableError, match="kernel's policy network disagrees"):
            TritonKernel(networks)


class NoGpu:
    """Stands in for Triton's driver: code is made for a Hopper GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class CompileOnly:
    """Stands in for the kernel: its launches compile and do nothing."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch


class TestCompiled:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self):
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            cwd=root,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\b[2-9]\d passed", done.stdout), done.stdout
        assert "skipped" not in done.stdout

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_machine_code_waits_after_stores(self, precision, monkeypatch, tmp_path):
        """What the interpreter can't show: it compiles, once, and no step reads before a barrier."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
        launches = CompileOnly(triton_kernel._forward)
        monkeypatch.setattr(triton_kernel, "_forward", launches)
        monkeypatch.setattr(TritonKernel, "_prove", lambda self: None)
        execute = TritonKernel(make_networks(), precision=precision)
        for batch in (1, 3, 16):
            execute(make_images(batch))
        assert len({id(kernel) for kernel in launches.compiled}) == 1
        code = launches.compiled[0].asm["ptx"]
        steps = re.findall(r"\b(ld\.global|st\.global|bar\.sync|cp\.async|wgmma\.mma_async)(\S*)", code)
        order = [name for name, _ in steps]
        assert "cp.async" not in order
        assert not any(".nc" in rest for name, rest in steps if name == "ld.global")
        assert order.count("st.global") > 20
        assert ("wgmma.mma_async" in order) == (precision == "bf16")
        waiting = False
        for name in order:
            assert not (waiting and name == "ld.global")
            waiting = name == "st.global" or (waiting and name != "bar.sync")
        assert not waiting

    def test_cpus_are_refused(self):
        with pytest.raises(UnavailableError, match="it runs on CUDA, not on cpu"):
            TritonKernel(make_networks())

    def test_without_triton_it_is_there_but_unavailable(self, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            monkeypatch.setitem(sys.modules, name, None)
        spec = importlib.util.spec_from_file_location("without_triton", triton_kernel.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(UnavailableError, match="Triton is not installed"):
            module.TritonKernel(make_networks())
