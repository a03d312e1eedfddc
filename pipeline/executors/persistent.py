"""The CUDA executor in Triton: one launch, in which a program takes an image through all its blocks.

Like native.cpp for CPUs: an image's policy steers plain control flow, so a dropped block costs nothing
and a kept one needs neither gather nor scatter, and the host waits for nothing. Activations stay in a
scratch of the program's own, small enough for the caches.

An activation there is [H + 2, W + 2, C] with a border of zeros that nobody writes, so convolutions have
no edges to treat. A convolution is a few products of a tile of pixels [P, I] and weights [I, O]. The
taps of a kernel row lie side by side in memory, so where channels are few, a whole row is one product:
[P, 4 I] by [4 I, O], the fourth tap's weights being zero. Channels are padded to powers of two by zero
weights; what is padded stays zero.

The threads of a program hand activations to each other through global memory. A barrier after every
step makes that sound: bar.sync orders the global memory accesses of the threads of one block, and no
other block touches the program's scratch. Loads and stores of one step never meet: it reads one buffer
and writes another, or adds to elements that only it reads.

Shapes: B images, K blocks, N classes, C channels, I and O those in and out, H and W pixels, P of a tile.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.executors.base import Executor, Networks, Output, UnavailableError
from pipeline.executors.packed import fold
from pipeline.policy_net import average_down
from pipeline.resnet import STAGES, ResNet

try:
    import triton
    import triton.language as tl
except ImportError:  # it is not on every platform
    triton = None

PIXEL = 4  # channels of an input pixel in the scratch: three and a zero
FEWEST, MOST = 16, 128  # channels: what tl.dot asks for, and what tiles have room for
# Up to how many input channels a kernel row is one product. Tensor cores gain by fewer steps; without
# them a zero tap costs a third more, so only the stem has it, where a tap alone is too short for tl.dot.
ROW_CHANNELS = {"fp32": PIXEL, "bf16": 64}
# Of the largest logit. bf16 rounds each activation to 2^-9 of itself; a wrong index, weight or barrier
# gives logits as far off as they are large.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
PROOF_PROGRAMS, PROOF_IMAGES = 2, 5  # several images a program, so that what one leaves behind shows


def _jit(function: Any) -> Any:
    """triton.jit, where there is Triton; arguments that vary from call to call compile nothing anew."""
    if triton is None:
        return function
    varying = {"inputs", "actions", "action_stride", "batch"} & set(function.__annotations__)
    return triton.jit(do_not_specialize=sorted(varying))(function)


# In all kernels, how = (row_channels, sums, precision): see ROW_CHANNELS and Persistent.SUMS.


@_jit
def _read(pixels: Any, dst: Any, height: tl.constexpr, width: tl.constexpr, how: tl.constexpr) -> None:
    """An image [H, W, 3] float32 into the scratch."""
    tile: tl.constexpr = how[1] // 16
    channel = tl.arange(0, 4)[None, :]
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]
        there = (pixel < height * width) & (channel < 3)
        value = tl.load(pixels + pixel * 3 + channel, mask=there, other=0.0)
        to = dst + ((pixel // width + 1) * (width + 2) + pixel % width + 1) * 4 + channel
        tl.store(to, value.to(dst.dtype.element_ty), mask=there)
    tl.debug_barrier()


@_jit
def _conv(
    src: Any, dst: Any, weights: Any, biases: Any, height: tl.constexpr, width: tl.constexpr,
    cin: tl.constexpr, cout: tl.constexpr, stride: tl.constexpr, add: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """dst [H, W, O] = relu(conv(src)), or relu(dst + conv(src))."""
    span: tl.constexpr = 4 if cin <= how[0] else 1  # taps of a product
    pitch: tl.constexpr = (width * stride + 2) * cin  # of a row of src
    tile: tl.constexpr = how[1] // cout
    inner = tl.arange(0, span * cin)
    outer = tl.arange(0, cout)
    bias = tl.load(biases + outer)[None, :]
    for start in range(0, height * width, tile):
        pixel = start + tl.arange(0, tile)
        near = tl.minimum(pixel, height * width - 1)  # past the end the last one is read, none stored
        y = near // width
        x = near % width
        at = src + (y * (stride * pitch) + x * (stride * cin))[:, None] + inner[None, :]
        to = dst + ((y + 1) * (width + 2) + x + 1)[:, None] * cout + outer[None, :]
        w = weights + inner[:, None] * cout + outer[None, :]
        total = tl.zeros((tile, cout), tl.float32) + bias
        if add:
            total += tl.load(to).to(tl.float32)
        for ky in tl.static_range(3):
            for kx in tl.static_range(0, 3, span):
                taken = tl.load(at + (ky * pitch + kx * cin))
                total = tl.dot(taken, tl.load(w), total, input_precision=how[2])
                w += span * cin * cout
        result = tl.maximum(total, 0.0).to(dst.dtype.element_ty)
        tl.store(to, result, mask=(pixel < height * width)[:, None])
    tl.debug_barrier()


@_jit
def _pool_and_pad(
    src: Any, dst: Any, height: tl.constexpr, width: tl.constexpr, cin: tl.constexpr,
    cout: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """The shortcut where the shape changes: 2x2 averages of src, then channels of zeros."""
    pitch: tl.constexpr = (2 * width + 2) * cin
    tile: tl.constexpr = how[1] // cout
    channel = tl.arange(0, cout)[None, :]
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]
        y = pixel // width
        x = pixel % width
        inside = pixel < height * width
        there = inside & (channel < cin)
        at = src + (2 * y + 1) * pitch + (2 * x + 1) * cin + channel
        total = tl.load(at, mask=there, other=0.0).to(tl.float32)
        total += tl.load(at + cin, mask=there, other=0.0).to(tl.float32)
        total += tl.load(at + pitch, mask=there, other=0.0).to(tl.float32)
        total += tl.load(at + (pitch + cin), mask=there, other=0.0).to(tl.float32)
        to = dst + ((y + 1) * (width + 2) + x + 1) * cout + channel
        tl.store(to, (total * 0.25).to(dst.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@_jit
def _block(
    actions: Any, src: Any, stream: Any, weights: Any, biases: Any, height: tl.constexpr,
    width: tl.constexpr, cin: tl.constexpr, cout: tl.constexpr, stride: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """If its action says so: stream = relu(stream + conv(relu(conv(src)))). Uniform: one image's action."""
    if tl.load(actions) != 0:
        hidden = stream + (height + 2) * (width + 2) * cout
        _conv(src, hidden, weights, biases, height, width, cin, cout, stride, False, how)
        second = weights + (12 if cin <= how[0] else 9) * cin * cout
        _conv(hidden, stream, second, biases + cout, height, width, cout, cout, 1, True, how)


@_jit
def _stage(
    actions: Any, src: Any, stream: Any, weights: Any, biases: Any, height: tl.constexpr,
    width: tl.constexpr, cin: tl.constexpr, cout: tl.constexpr, stride: tl.constexpr,
    blocks: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """The blocks of a stage, from src to stream; the same buffer where the shape stays."""
    if stride == 2:
        _pool_and_pad(src, stream, height, width, cin, cout, how)
    _block(actions, src, stream, weights, biases, height, width, cin, cout, stride, how)
    conv: tl.constexpr = (12 if cout <= how[0] else 9) * cout * cout
    rest = weights + ((12 if cin <= how[0] else 9) * cin * cout + conv)
    for block in range(1, blocks):
        _block(actions + block, stream, stream, rest + (block - 1) * (2 * conv),
               biases + block * (2 * cout), height, width, cout, cout, 1, how)  # fmt: skip


@_jit
def _head(
    stream: Any, weights: Any, biases: Any, logits: Any, outputs: tl.constexpr, height: tl.constexpr,
    width: tl.constexpr, channels: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """Mean over the pixels, then the linear layer, weights [C, N], all in float32."""
    tile: tl.constexpr = how[1] // channels
    some: tl.constexpr = 32  # outputs at a time
    channel = tl.arange(0, channels)
    mean = tl.zeros((channels,), tl.float32)
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]
        at = stream + ((pixel // width + 1) * (width + 2) + pixel % width + 1) * channels
        value = tl.load(at + channel[None, :], mask=pixel < height * width, other=0.0)
        mean += tl.sum(value.to(tl.float32), axis=0) / (height * width)
    for start in range(0, outputs, some):
        output = start + tl.arange(0, some)
        there = output < outputs
        at = weights + channel[:, None] * outputs + output[None, :]
        products = tl.load(at, mask=there[None, :], other=0.0) * mean[:, None]
        bias = tl.load(biases + output, mask=there, other=0.0)
        tl.store(logits + output, tl.sum(products, axis=0) + bias, mask=there)
    tl.debug_barrier()


@_jit
def _forward(
    inputs: Any, actions: Any, action_stride: Any, weights: Any, biases: Any, fc_weight: Any,
    fc_bias: Any, logits: Any, scratch: Any, batch: Any, height: tl.constexpr, width: tl.constexpr,
    c0: tl.constexpr, c1: tl.constexpr, c2: tl.constexpr, blocks: tl.constexpr, outputs: tl.constexpr,
    space: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """Logits [B, N] of inputs [B, H, W, 3] under actions [B, K]; a program takes every so manieth image.

    c0, c1 and c2 are the stages' channels, blocks how many each has, space a program's part of scratch.
    """
    h1: tl.constexpr = height // 2
    w1: tl.constexpr = width // 2
    h2: tl.constexpr = height // 4
    w2: tl.constexpr = width // 4
    image = tl.program_id(0).to(tl.int64)  # as are all offsets that grow with the batch
    pixels = scratch + image * space
    stream0 = pixels + (height + 2) * (width + 2) * 4
    stream1 = stream0 + 2 * (height + 2) * (width + 2) * c0
    stream2 = stream1 + 2 * (h1 + 2) * (w1 + 2) * c1
    taps0: tl.constexpr = 12 if c0 <= how[0] else 9
    taps1: tl.constexpr = 12 if c1 <= how[0] else 9
    weights0 = weights + 12 * 4 * c0
    weights1 = weights0 + 2 * blocks * taps0 * c0 * c0
    weights2 = weights1 + (taps0 * c0 * c1 + (2 * blocks - 1) * taps1 * c1 * c1)
    biases1 = biases + (1 + 2 * blocks) * c0
    biases2 = biases1 + 2 * blocks * c1
    while image < batch:
        acts = actions + image * action_stride
        _read(inputs + image * (height * width * 3), pixels, height, width, how)
        _conv(pixels, stream0, weights, biases, height, width, 4, c0, 1, False, how)
        _stage(acts, stream0, stream0, weights0, biases + c0, height, width, c0, c0, 1, blocks, how)
        _stage(acts + blocks, stream0, stream1, weights1, biases1, h1, w1, c0, c1, 2, blocks, how)
        _stage(acts + 2 * blocks, stream1, stream2, weights2, biases2, h2, w2, c1, c2, 2, blocks, how)
        _head(stream2, fc_weight, fc_bias, logits + image * outputs, outputs, h2, w2, c2, how)
        image += tl.num_programs(0)


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this module was imported: kernels run on CPUs, slowly."""
    return triton is not None and not isinstance(_forward, triton.JITFunction)


class _Network:
    """A ResNet's weights as the kernel wants them, and the scratch for each size of its images."""

    def __init__(self, resnet: ResNet, precision: str) -> None:
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.row_channels = ROW_CHANNELS[precision]
        self.blocks = resnet.num_blocks // STAGES
        self.outputs = resnet.num_classes
        self.channels = [_padded(resnet.width * 2**stage) for stage in range(STAGES)]
        convs = [(resnet.conv1, resnet.bn1)]
        for block in resnet.flat_blocks():
            convs += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        packed = [self._packed(*fold(conv, bn)) for conv, bn in convs]
        self.weights = torch.cat([weight for weight, _ in packed])
        self.biases = torch.cat([bias for _, bias in packed])
        extra = self.channels[-1] - resnet.fc.in_features
        self.fc_weight = F.pad(resnet.fc.weight.detach().float().t(), (0, 0, 0, extra)).contiguous()
        self.fc_bias = resnet.fc.bias.detach().float()
        self.spaces: dict[tuple[int, int], Tensor] = {}

    def _packed(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """[O, I, 3, 3] to a flat [ky, kx, I, O], channels padded; kx is 4 long in rows of one product."""
        cout, cin = weight.shape[:2]
        ins = PIXEL if cin == 3 else _padded(cin)
        more_taps = 1 if ins <= self.row_channels else 0
        more = (0, _padded(cout) - cout, 0, ins - cin, 0, more_taps)
        packed = F.pad(weight.permute(2, 3, 1, 0), more).to(self.dtype)
        return packed.flatten(), F.pad(bias.float(), (0, _padded(cout) - cout))

    def _scratch(self, height: int, width: int, programs: int) -> Tensor:
        """[programs, space]; its borders are zero when it is made, and ever after."""
        held = self.spaces.get((height, width))
        if held is None or len(held) < programs:
            space = (height + 2) * (width + 2) * PIXEL
            for stage, channels in enumerate(self.channels):
                space += 2 * ((height >> stage) + 2) * ((width >> stage) + 2) * channels
            space += self.channels[-1]  # a fourth tap reads one pixel past the end
            held = self.weights.new_zeros(programs, -(-space // 64) * 64)
            self.spaces[height, width] = held
        return held

    def logits(self, inputs: Tensor, actions: Tensor | None, programs: int, kind: type[Persistent]) -> Tensor:
        """Logits [B, N] float32 of inputs [B, 3, H, W] under actions [B, K] bool (None: every block).

        Raises:
            ValueError: sides that do not halve twice.
        """
        batch, _, height, width = inputs.shape
        if height % 4 or width % 4:
            raise ValueError(f"images have {height} x {width} pixels, expected multiples of 4")
