"""The CPU executors in C++ (native.cpp, native_bf16.cpp): an image at a time, only the blocks it keeps.

The C++ is compiled once on the machine where it runs; without a compiler the executor is unavailable.
Shapes: B images, V policies, K blocks, N classes, O output channels, I input channels,
T taps of a kernel row, G neighbouring outputs computed together.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.inference.base import Executor, Networks, Output, UnavailableError
from pipeline.inference.fused import fold
from pipeline.inference.threads import native_threads
from pipeline.models.resnet import ResNet

FOLDER = Path(__file__).parent
SHARED = FOLDER / "native_common.hpp"
SOURCES = {"fp32": FOLDER / "native.cpp", "bf16": FOLDER / "native_bf16.cpp"}
BUILDS = ".native"  # folder in the project's root
PROJECT_MARKER = ".dvc"  # is in that root, and not beside the code that a logged model ships
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
# what compilers on x86 and others take, most specific first
TUNING = [["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []]
EMULATED = {"avx2": [["-march=x86-64-v3"], []]}  # for CPUs with less than this one
CAPABILITY = "ATEN_CPU_CAPABILITY"  # the variable that limits PyTorch's own kernels


class _Conv(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("in_channels", ctypes.c_int32),
        ("out_channels", ctypes.c_int32), ("stride", ctypes.c_int32), ("block", ctypes.c_int32),
    ]  # fmt: skip


class _Network(ctypes.Structure):
    _fields_ = [
        ("convs", ctypes.POINTER(_Conv)), ("fc_weight", ctypes.c_void_p), ("fc_bias", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int32), ("outputs", ctypes.c_int32),
    ]  # fmt: skip


class _Values(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "mask", "weight", "bias", "costs", "gamma", "temperature", "resnet_temperature", "own_share"
        )),
        ("paths", ctypes.c_int32), ("answers", ctypes.c_int32),
    ]  # fmt: skip


class _Job(ctypes.Structure):
    _fields_ = [
        ("resnet", ctypes.POINTER(_Network)), ("policy_net", ctypes.POINTER(_Network)),
        ("values", ctypes.POINTER(_Values)),
        ("images", ctypes.c_void_p), ("inputs", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p), ("actions", ctypes.c_void_p), ("logits", ctypes.c_void_p),
        ("batch", ctypes.c_int64), ("decides", ctypes.c_int32), ("policies", ctypes.c_int32),
        ("height", ctypes.c_int32), ("width", ctypes.c_int32), ("policy_size", ctypes.c_int32),
        ("teams", ctypes.c_int32), ("team_size", ctypes.c_int32), ("next_image", ctypes.c_void_p),
        ("barriers", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def library(precision: str = "fp32") -> ctypes.CDLL:
    """The compiled source for a precision; compile it if no folder has it.

    Raises:
        UnavailableError: no C++ compiler, or it fails.
    """
    compiler = (
        os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    )
    if compiler is None:
        raise UnavailableError("no C++ compiler (c++, g++ or clang++) is installed")
    source = SOURCES[precision]
    machine = f"{source.name} {compiler} {FLAGS} {_tuning()} {platform.machine()} {_cpu_flags()}"
    key = hashlib.sha256(source.read_bytes() + SHARED.read_bytes() + machine.encode()).hexdigest()[:16]
    problem = ""
    for folder in _folders():
        built = folder / f"{key}.so"
        try:
            if not built.exists():
                _build(compiler, source, built)
            loaded = ctypes.CDLL(str(built))
        except OSError as error:  # a folder that can't be written, or from which nothing may be loaded
            problem = f"{folder} can't hold the compiled {source.name}: {error}"
            continue
        loaded.make_space.restype = ctypes.c_void_p
        loaded.make_space.argtypes = [ctypes.POINTER(_Job)]
        loaded.free_space.argtypes = [ctypes.c_void_p]
        loaded.run.argtypes = [ctypes.POINTER(_Job), ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32]
        return loaded
    raise UnavailableError(problem)


def _folders() -> Iterator[Path]:
    """Folders for compiled libraries, best first: one in the project's root.

    A logged model is no project, and its folder must stay as it was logged. Then the user's cache is
    used, or, where that can't be written (in a container, say), a folder of this process alone.
    """
    dvc_root = os.environ.get("DVC_ROOT")
    root = Path(dvc_root) if dvc_root else FOLDER.parents[1]
    if dvc_root or (root / PROJECT_MARKER).is_dir():
        yield root / BUILDS
        return
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdrop"
    yield Path(_process_folder().name)


@cache
def _process_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="blockdrop-")  # removed when Python exits


def _cpu_flags() -> str:
    """The CPU's features, as machines that share a folder may not run each other's libraries."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _tuning() -> list[list[str]]:
    """Compiler flags for this CPU, or for the lesser one that CAPABILITY names."""
    return EMULATED.get(os.environ.get(CAPABILITY, ""), TUNING)


def _build(compiler: str, source: Path, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    failure = ""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / "output.so"
        for tuning in _tuning():
            command = [compiler, *FLAGS, *tuning, str(source), "-o", str(output)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise UnavailableError(f"{compiler} does not run: {error}") from None
            if done.returncode == 0:
                output.replace(built)  # atomic: other processes may build the same
                return
            failure = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
    raise UnavailableError(f"{compiler} does not compile {source.name}: {failure}")


class _PackedConv(NamedTuple):
    """A convolution in a kernel's layout; `bias` has a number for each column of `weight`."""

    weight: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int
    block: int


class _Fp32Kernel:
    """The layout of weights in native.cpp."""

    def __init__(self) -> None:
        self.library = library("fp32")
        self.lanes = self.library.lanes()

    def pack(self, weight: Tensor, bias: Tensor, stride: int) -> _PackedConv:
        """Weight [O, I, 3, 3] as [ky, kx, I][G] for each group of G output channels, largest first."""
        del stride  # the layout does not depend on it
        out_channels, in_channels = weight.shape[:2]
        groups: list[int] = []
        for size in (2 * self.lanes, self.lanes, max(self.lanes // 2, 4), 4):
            groups += [size] * ((out_channels - sum(groups)) // size)
        parts = [part.permute(2, 3, 1, 0).flatten() for part in weight.split(groups)]
        return _PackedConv(torch.cat(parts), bias.contiguous(), in_channels, out_channels, 1)


class _Bf16Kernel:
    """The layout of weights in native_bf16.cpp. Channels are padded with zeros, which stay zeros."""

    COLUMNS = 16  # output channels of one product
    IMAGE_CHANNELS = 8
    LINE = 32  # inputs in a cache line

    def __init__(self) -> None:
        self.library = library("bf16")
        self.depth = self.library.depth()
        if self.depth == 0:
            raise UnavailableError(
                "this CPU has no bf16 instructions (AMX or AVX512_BF16), or the system or "
                f"{CAPABILITY} bars them"
            )

    def pack(self, weight: Tensor, bias: Tensor, stride: int) -> _PackedConv:
        """Weight [O, I, 3, 3] as [G * O / 16][ky][T * I / 2][16][2]."""
        out_channels, in_channels = weight.shape[:2]
        outputs = _round_up(out_channels, self.COLUMNS)
        inputs = self.IMAGE_CHANNELS if in_channels == 3 else _round_up(in_channels, self.COLUMNS)
        group = 1 if self.depth < self.LINE or stride * inputs % self.LINE == 0 else 2
        # one product computes G neighbouring outputs, which read T = stride * (G - 1) + 3 taps of a row
        taps = stride * (group - 1) + 3
        row_length = _round_up(taps * inputs, self.depth)
        matrix = torch.zeros(3, taps, inputs, group, outputs)  # [ky, T, I, G, O]
        for member in range(group):
            window = slice(stride * member, stride * member + 3)  # taps of this output
            matrix[:, window, :in_channels, member, :out_channels] = weight.permute(2, 3, 1, 0)
        rows = matrix.flatten(3).flatten(1, 2)  # [ky, T * I, G * O]
        rows = F.pad(rows, (0, 0, 0, row_length - taps * inputs))  # [ky, row_length, G * O]
        # pairs of inputs lie side by side, as the bf16 instructions multiply two at a time
        packed = rows.view(3, row_length // 2, 2, -1, self.COLUMNS).permute(3, 0, 1, 4, 2)
        padded_bias = F.pad(bias, (0, outputs - out_channels)).repeat(group)
        packed = packed.to(torch.bfloat16).contiguous()
        return _PackedConv(packed, padded_bias, inputs, outputs, group)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _PackedNetwork:
    """A network's weights in a kernel's layout; it keeps the tensors that the structure points to."""

    def __init__(self, resnet: ResNet, kernel: _Fp32Kernel | _Bf16Kernel) -> None:
        if resnet.family != "cifar":
            raise UnavailableError("it knows the blocks of CIFAR's ResNets alone, not ImageNet's")
        pairs = [(resnet.conv1, resnet.bn1)]
        for block in resnet.flat_blocks():
            pairs += block.convolutions()
        self.tensors: list[Tensor] = []
        convs = []
        for conv, bn in pairs:
            if conv.out_channels % 4 != 0:
                raise UnavailableError(f"{conv.out_channels} channels are no multiple of 4")
            stride = conv.stride[0]
            weight, bias, *channels, width = kernel.pack(*fold(conv, bn), stride)
            convs.append(_Conv(self._keep(weight), self._keep(bias), *channels, stride, width))
        self.convs = (_Conv * len(convs))(*convs)
        fc_weight = resnet.fc.weight.detach().float()
        padding = convs[-1].out_channels - fc_weight.shape[1]
        self.structure = _Network(
            convs=self.convs,
            fc_weight=self._keep(F.pad(fc_weight, (0, padding)).contiguous()),
            fc_bias=self._keep(resnet.fc.bias.detach().float()),
            num_blocks=resnet.num_blocks,
            outputs=resnet.num_classes,
        )

    def _keep(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()


class Native(Executor):
    """On CPUs: the same time per image at batch 1 as at 1024, and at any mix of policies.

    Raises:
        UnavailableError: another device, channels that are no multiple of 4, no compiler, or bf16 on a
            CPU that has neither AMX nor AVX512_BF16.
    """

    name = "native"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        if self.device.type != "cpu":
            raise UnavailableError(f"it runs on CPUs, not on {self.device.type}")
        kernel = _Fp32Kernel() if precision == "fp32" else _Bf16Kernel()
        self.library = kernel.library
        self.resnet = _PackedNetwork(networks.resnet, kernel)
        self.policy_net = (
            None if networks.policy_net is None else _PackedNetwork(networks.policy_net.features, kernel)
        )
        self.values = self._values()
        self.threads = native_threads(torch.get_num_threads())
        self.spaces: dict[tuple[int | bool | None, ...], list[int]] = {}
        self.scale, self.shift = networks.normalisation.scale_and_shift()

    def _values(self) -> _Values | None:
        """Where the values of paths lie; the module keeps them, so gamma may be set to another value."""
        policy_net = self.networks.policy_net
        values = None if policy_net is None else policy_net.path_values
        if values is None:
            return None
        buffers = {name: tensor for name, tensor in values.named_buffers() if name != "dial"}
        assert all(tensor.is_contiguous() for tensor in buffers.values())
        return _Values(
            paths=len(values.mask),
            answers=values.answers,
            **{name.rpartition(".")[2]: tensor.data_ptr() for name, tensor in buffers.items()},
        )

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        images = images.contiguous()
        return self._job(images.shape[:3], actions, images=images.data_ptr())

    def _run_under(self, images: Tensor, policies: Tensor) -> Tensor:
        return self._run(images, policies.transpose(0, 1)).logits.transpose(0, 1)

    def _decide(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError("the C++ runs the policy network itself")

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        rows = inputs.float().permute(0, 2, 3, 1).contiguous()
        return self._job(rows.shape[:3], actions, inputs=rows.data_ptr()).logits

    def _classify_under(self, inputs: Tensor, policies: Tensor) -> Tensor:
        return self._classify(inputs, policies.transpose(0, 1)).transpose(0, 1)

    def _spaces(self, job: _Job, key: tuple[int | bool | None, ...], teams: int) -> ctypes.Array[Any]:
        """Memory for the activations of an image for each team, kept from call to call."""
        spaces = self.spaces.setdefault(key, [])
        while len(spaces) < teams:
            spaces.append(self.library.make_space(job))
            weakref.finalize(self, self.library.free_space, spaces[-1])
        return (ctypes.c_void_p * teams)(*spaces[:teams])

    def _job(
        self,
        shape: torch.Size,
        actions: Tensor | None,
        *,
        images: int | None = None,
        inputs: int | None = None,
    ) -> Output:
        """Run a batch in C++ on all threads.

        Args:
            shape: B, H, W.
            actions: [B, K], or [B, V, K] for V policies an image; None: the policy network's.
            images: address of uint8 [B, H, W, 3], or
            inputs: address of normalised float32 [B, H, W, 3].
        """
        batch, height, width = shape
        if height != width or height % 4:  # C++ would write past the end of its memory
            raise ValueError(f"images have {height} x {width} pixels, expected a square, side 4n")
        decides = actions is None
        if actions is None:
            actions = torch.empty(batch, self.networks.num_blocks, dtype=torch.bool)  # C++ fills it in
        actions = actions.contiguous()  # [B, K] or [B, V, K]
        logits = self._empty_logits(actions)  # [B, N] or [B, V, N]
        num_policies = actions[0, ..., 0].numel()  # V
        # A team of threads works on one image at a time. With at least as many images as threads each
        # thread is a team; with fewer, several threads share an image and meet at the team's barriers.
        teams = min(batch, self.threads.count)
        team_size = self.threads.count // teams
        next_image = ctypes.c_int64(0)  # a counter from which teams take their next image
        barriers = (ctypes.c_int32 * (2 * teams))()
        policy_net = self.networks.policy_net
        input_size = None if policy_net is None else policy_net.input_size
        # where the policy network classifies, it has a part in every answer
        weights = self.policy_net if decides or self.values else None
        job = _Job(
            resnet=ctypes.pointer(self.resnet.structure),
            policy_net=None if weights is None else ctypes.pointer(weights.structure),
            values=None if self.values is None else ctypes.pointer(self.values),
            images=images,
            inputs=inputs,
            scale=self.scale.data_ptr(),
            shift=self.shift.data_ptr(),
            actions=actions.data_ptr(),
            logits=logits.data_ptr(),
            batch=batch,
            decides=decides,
            policies=num_policies,
            height=height,
            width=width,
            policy_size=input_size or height,
            teams=teams,
            team_size=team_size,
            next_image=ctypes.addressof(next_image),
            barriers=ctypes.addressof(barriers),
        )
        key = (height, width, input_size, weights is None, num_policies)
        spaces = self._spaces(job, key, teams)
        self.threads.run(lambda thread: self.library.run(job, spaces, thread), teams * team_size)
        return Output(logits=logits, actions=actions)
