"""ImageNet's ResNets on CPUs by oneDNN itself: convolutions are prepared once, and then only called.

PyTorch calls the same kernels, but it looks each up, and makes its output, in every call, which takes
some 7 to 16 % longer at batch 1 (docs/imagenet.md). Here a plan holds the kernels of a whole
network for a number of images, with the memory that they read and write. Dropping a block is not calling
its kernels.

The library is Intel's build with OpenMP, which takes PyTorch's threads. Names of its C interface are at
https://uxlfoundation.github.io/oneDNN (version 3).
Shapes: R images of a plan, K blocks, N classes, C channels, H and W pixels.
"""

import ctypes
import importlib.metadata
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.fused import FusedHead, fold
from pipeline.inference.grouped import Grouped
from pipeline.models.resnet import Block, ResNet

PACKAGE = "onednn-cpu-gomp"
LIBRARY = "libdnnl.so.3"
# More images at once are hardly faster, and each number of images needs a plan: larger groups are split
# into parts of 4, 2 and 1.
MOST_IMAGES = 4
ALIGNMENT = 64  # bytes of a cache line

# values of oneDNN's enumerations
CPU, IN_ORDER = 1, 1
FORWARD_INFERENCE, DIRECT, RELU, MAXIMUM = 96, 1, 32, 511
ANY, VECTOR, PLANAR, CHANNELS_LAST = 1, 2, 5, 22  # layouts
DTYPES = {torch.bfloat16: 2, torch.float32: 3}
WEIGHTS_OF, SCRATCHPAD_OF = 131, 136  # questions to a kernel's description
USER_SCRATCHPAD = 1
SOURCE, TARGET, WEIGHTS, BIAS, SCRATCHPAD = 1, 17, 33, 41, 80  # arguments of a kernel
UNIMPLEMENTED = 3

Dims = ctypes.c_int64 * 12


@cache
def library() -> ctypes.CDLL:
    """oneDNN, loaded once.

    Raises:
        UnavailableError: it is not installed, or can't be loaded.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
        path = next(file.locate() for file in files if file.name == LIBRARY)
        # PyTorch exports parts of its own oneDNN, which must not replace this one's
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UnavailableError(f"{PACKAGE} is not installed; `make peers` installs it") from None
    except (AttributeError, OSError) as error:  # no RTLD_DEEPBIND: not Linux
        raise UnavailableError(f"{PACKAGE} can't be loaded: {error}") from None
    if not _has_threads_of_torch(loaded):
        raise UnavailableError(f"{PACKAGE} has other OpenMP threads than this PyTorch")
    loaded.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
    loaded.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    loaded.dnnl_primitive_execute.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    return loaded


def _has_threads_of_torch(loaded: ctypes.CDLL) -> bool:
    """Whether it follows `torch.set_num_threads`: PyTorch may have an OpenMP of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        return bool(loaded.omp_get_max_threads() == threads + 1)
    finally:
        torch.set_num_threads(threads)


def _check(status: int) -> None:
    if status == UNIMPLEMENTED:
        raise UnavailableError("oneDNN has no convolution in this precision on this CPU")
    if status:
        raise RuntimeError(f"oneDNN refuses a call with status {status}")


class _Object:
    """An object of oneDNN's, destroyed when nobody holds it any more."""

    def __init__(self, create: str, destroy: str, *arguments: Any) -> None:
        self.handle = ctypes.c_void_p()
        _check(getattr(library(), create)(ctypes.byref(self.handle), *arguments))
        handle = ctypes.c_void_p(self.handle.value)
        weakref.finalize(self, getattr(library(), destroy), handle).atexit = False


@cache
def _engine() -> _Object:
    return _Object("dnnl_engine_create", "dnnl_engine_destroy", CPU, ctypes.c_size_t(0))


@cache
def _stream() -> _Object:
    """Where all kernels run; on a CPU a call returns when its kernel has run."""
    return _Object("dnnl_stream_create", "dnnl_stream_destroy", _engine().handle, IN_ORDER)


def _description(shape: Sequence[int], layout: int, dtype: torch.dtype) -> _Object:
    return _Object(
        "dnnl_memory_desc_create_with_tag", "dnnl_memory_desc_destroy",
        len(shape), Dims(*shape), DTYPES[dtype], layout,
    )  # fmt: skip


class _Memory:
    """Memory as oneDNN takes it: a tensor's, or as much of its own as the description asks for."""

    def __init__(self, description: ctypes.c_void_p, tensor: Tensor | None = None) -> None:
        if tensor is None:
            size = library().dnnl_memory_desc_get_size(description)
            tensor = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
            tensor = tensor[-tensor.data_ptr() % ALIGNMENT :]
        self.tensor = tensor  # which must live as long
        self.object = _Object(
            "dnnl_memory_create", "dnnl_memory_destroy",
            description, _engine().handle, ctypes.c_void_p(tensor.data_ptr()),
        )  # fmt: skip


class _Argument(ctypes.Structure):
    _fields_ = [("which", ctypes.c_int), ("memory", ctypes.c_void_p)]


class _Call:
    """A kernel with its arguments, from its description."""

    def __init__(self, description: _Object, arguments: Mapping[int, _Memory]) -> None:
        kernel = _Object("dnnl_primitive_create", "dnnl_primitive_destroy", description.handle)
        values = [_Argument(which, memory.object.handle) for which, memory in arguments.items()]
        array = (_Argument * len(values))(*values)
        self.keep = kernel, array, dict(arguments)  # they must live as long
        self.execute = library().dnnl_primitive_execute
        handle, stream = kernel.handle.value, _stream().handle.value
        self.arguments = handle, stream, len(values), ctypes.addressof(array)

    def __call__(self) -> None:
        _check(self.execute(*self.arguments))


class _Conv:
    """A convolution with its batch norm folded in, for images of any number and size."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        weight, bias = (tensor.float().contiguous() for tensor in fold(conv, bn))
        self.dtype, self.shape = dtype, tuple(weight.shape)  # [O, I, S, S]
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])
        self.plain = _description(self.shape, PLANAR, torch.float32)
        self.weight = _Memory(self.plain.handle, weight)
        self.vector = _description(self.shape[:1], VECTOR, torch.float32)
        self.bias = _Memory(self.vector.handle, bias)
        # in each layout that a kernel has asked for, with that kernel's description
        self.packed: list[tuple[_Object, ctypes.c_void_p, _Memory]] = []
        self.lock = threading.Lock()

    def output(self, x: Tensor) -> Tensor:
        """Uninitialised memory for the convolution of x [R, I, H, W], channels_last."""
        out, _, size, _ = self.shape
        height, width = ((side + 2 * self.padding - size) // self.stride + 1 for side in x.shape[2:])
        return torch.empty(
            len(x), out, height, width, dtype=self.dtype, memory_format=torch.channels_last
        )

    def call(self, x: Tensor, out: Tensor, *, relu: bool = False, add: bool = False) -> _Call:
        """Write conv(x) to `out`, on request plus `out` and with a ReLU; both are channels_last."""
        attributes = self._attributes(relu, add)
        read = _description(x.shape, CHANNELS_LAST, self.dtype)
        written = _description(out.shape, CHANNELS_LAST, self.dtype)
        weight = _description(self.shape, ANY, self.dtype)
        stride, padding = Dims(self.stride, self.stride), Dims(self.padding, self.padding)
        description = _Object(
            "dnnl_convolution_forward_primitive_desc_create", "dnnl_primitive_desc_destroy",
            _engine().handle, FORWARD_INFERENCE, DIRECT, read.handle, weight.handle, self.vector.handle,
            written.handle, stride, Dims(), padding, padding, attributes.handle,
        )  # fmt: skip
        scratchpad = library().dnnl_primitive_desc_query_md(description.handle, SCRATCHPAD_OF, 0)
        arguments = {
            SOURCE: _Memory(read.handle, x),
            WEIGHTS: self._pack(description),
            BIAS: self.bias,
            TARGET: _Memory(written.handle, out),
            SCRATCHPAD: _Memory(ctypes.c_void_p(scratchpad)),
        }
        return _Call(description, arguments)

    def _attributes(self, relu: bool, add: bool) -> _Object:
        after = _Object("dnnl_post_ops_create", "dnnl_post_ops_destroy")
        if add:
            _check(library().dnnl_post_ops_append_sum(after.handle, ctypes.c_float(1), 0, 0))
        if relu:
            zero = ctypes.c_float(0)
            _check(library().dnnl_post_ops_append_eltwise(after.handle, RELU, zero, zero))
        attributes = _Object("dnnl_primitive_attr_create", "dnnl_primitive_attr_destroy")
        _check(library().dnnl_primitive_attr_set_post_ops(attributes.handle, after.handle))
        _check(library().dnnl_primitive_attr_set_scratchpad_mode(attributes.handle, USER_SCRATCHPAD))
        return attributes

    def _pack(self, kernel: _Object) -> _Memory:
        """The weight in the layout that a kernel's description asks for."""
        layout = ctypes.c_void_p(library().dnnl_primitive_desc_query_md(kernel.handle, WEIGHTS_OF, 0))
        with self.lock:
            for _, known, memory in self.packed:
                if library().dnnl_memory_desc_equal(known, layout):
                    return memory
            memory = _Memory(layout)
            reorder = _Object(
                "dnnl_reorder_primitive_desc_create", "dnnl_primitive_desc_destroy",
                self.plain.handle, _engine().handle, layout, _engine().handle, None,
            )  # fmt: skip
            _Call(reorder, {SOURCE: self.weight, TARGET: memory})()
            self.packed.append((kernel, layout, memory))
            return memory


def _max_pool(pool: nn.MaxPool2d, x: Tensor, out: Tensor) -> _Call:
    """Write pool(x) to `out`; both are channels_last."""
    read = _description(x.shape, CHANNELS_LAST, x.dtype)
    written = _description(out.shape, CHANNELS_LAST, x.dtype)
    sizes = cast(list[int], [pool.kernel_size, pool.stride, pool.padding])  # of squares
    size, stride, padding = (Dims(value, value) for value in sizes)
    description = _Object(
        "dnnl_pooling_forward_primitive_desc_create", "dnnl_primitive_desc_destroy", _engine().handle,
        FORWARD_INFERENCE, MAXIMUM, read.handle, written.handle, stride, size, Dims(), padding, padding,
        None,
    )  # fmt: skip
    return _Call(description, {SOURCE: _Memory(read.handle, x), TARGET: _Memory(written.handle, out)})


class _Block:
    """The convolutions of a block, and its shortcut's, which is None where the shape stays."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.residual = [_Conv(conv, bn, dtype) for conv, bn in block.convolutions()]
        self.shortcut: _Conv | None = None
        if isinstance(block.shortcut, nn.Sequential):
            conv, bn = block.shortcut
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(bn, nn.BatchNorm2d)
            self.shortcut = _Conv(conv, bn, dtype)


class _Plan:
    """A network for inputs of one shape [R, 3, H, W], with all memory between its layers."""

    def __init__(self, network: "OneDnnNetwork", shape: torch.Size) -> None:
        self.head = network.head
        self.inputs = torch.empty(shape, dtype=network.dtype, memory_format=torch.channels_last)
        stem = network.conv1.output(self.inputs)
        x = network.pool(stem).contiguous(memory_format=torch.channels_last)
        self.stem = network.conv1.call(self.inputs, stem, relu=True), _max_pool(network.pool, stem, x)
        # inside the residuals, by place and shape: blocks that follow each other share it
        inner: dict[tuple[int, torch.Size], Tensor] = {}
        self.blocks: list[tuple[list[_Call], list[_Call]]] = []  # (shortcut, residual)
        for block in network.blocks:
            out, shortcut = x, []  # without weights it is x itself, to which the residual is added
            if block.shortcut is not None:
                out = block.shortcut.output(x)
                shortcut = [block.shortcut.call(x, out)]
            residual, (*convs, last) = [], block.residual
            for place, conv in enumerate(convs):
                written = conv.output(x)
                written = inner.setdefault((place, written.shape), written)
                residual.append(conv.call(x, written, relu=True))
                x = written
            residual.append(last.call(x, out, relu=True, add=True))
            self.blocks.append((shortcut, residual))
            x = out
        self.last = x

    def __call__(self, inputs: Tensor, policy: Sequence[bool]) -> Tensor:
        """Logits [R, N] float32 of inputs [R, 3, H, W] under one policy of K blocks."""
        self.inputs.copy_(inputs)
        for call in self.stem:
            call()
        for (shortcut, residual), keep in zip(self.blocks, policy, strict=True):
            for call in (*shortcut, *residual) if keep else shortcut:
                call()
        return self.head(self.last)


class OneDnnNetwork:
    """A ResNet, or the one inside a policy network, in evaluation mode."""

    def __init__(self, resnet: ResNet, dtype: torch.dtype) -> None:
        self.dtype = dtype
        if not isinstance(resnet.pool, nn.MaxPool2d):
            raise UnavailableError("it knows the networks of ImageNet alone, not CIFAR's")
        self.conv1, self.pool = _Conv(resnet.conv1, resnet.bn1, dtype), resnet.pool
        self.blocks = [_Block(block, dtype) for block in resnet.flat_blocks()]
        self.head = FusedHead(resnet.fc, dtype)
        # plans that nobody runs, by the shape of inputs and the threads they are made for
        self.idle: dict[tuple[torch.Size, int], list[_Plan]] = {}
        self.lock = threading.Lock()

    @torch.no_grad()
    def forward(self, inputs: Tensor, policy: Sequence[bool] | None = None) -> Tensor:
        """Logits [B, N] float32 of inputs [B, 3, H, W] under one policy of K blocks (None: all run)."""
        policy = [True] * len(self.blocks) if policy is None else policy
        parts = inputs.split(list(_sizes(len(inputs))))
        return torch.cat([self._run(part, policy) for part in parts])

    def free(self) -> None:
        """Free the plans."""
        with self.lock:
            self.idle.clear()

    def _run(self, inputs: Tensor, policy: Sequence[bool]) -> Tensor:
        key = inputs.shape, torch.get_num_threads()
        with self.lock:
            plans = self.idle.setdefault(key, [])
            plan = plans.pop() if plans else None
        plan = plan or _Plan(self, inputs.shape)
        logits = plan(inputs, policy)
        with self.lock:
            self.idle.setdefault(key, []).append(plan)
        return logits


def _sizes(count: int) -> Iterator[int]:
    """`count` as a sum of powers of two, none beyond MOST_IMAGES."""
    while count:
        size = min(MOST_IMAGES, 1 << count.bit_length() - 1)
        yield size
        count -= size


class OneDnn(Grouped):
    """`grouped` with convolutions that are prepared once; the fastest for ImageNet's ResNets on CPUs."""

    name = "onednn"
    network_kind = OneDnnNetwork

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        if networks.device.type != "cpu":
            raise UnavailableError("onednn runs on CPUs alone")
        super().__init__(networks, precision=precision)
        self.network.forward(torch.zeros(1, 3, 64, 64, dtype=self.dtype))  # says what can't run here

    def free(self) -> None:
        self.network.free()
        if self.policy_net is not None:
            self.policy_net.features.free()
