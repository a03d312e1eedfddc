"""The CUDA executor in Triton: one launch, in which a program takes an image through all its blocks.

It works as native.cpp does on CPUs: an image's policy steers plain control flow, so a dropped block
costs nothing, a kept one needs neither gather nor scatter, and the host waits for nothing. Each program
keeps its activations in scratch memory of its own, small enough for the caches.

An activation is [H + 2, W + 2, C] with a border of zeros that is never written, so convolutions have no
edges to treat. A convolution is a sum of products of a tile of pixels [P, D] and weights [D, O]. The
3 I inputs of a kernel row lie side by side in memory. Where I is small, one product takes them all, and
a fourth tap of zero weights with them, because D must be a power of two; otherwise D divides I.
Channels are padded to powers of two by zero weights, so padded channels stay zero.

The threads of a program hand activations to each other through global memory, with a barrier after each
step. That is sound: bar.sync orders the accesses of one block's threads, to global memory too, and no
other block touches the program's scratch. Within a step no thread reads what another one writes: a step
reads one buffer and writes another, or adds to elements that only the same thread reads.

Shapes: B images, K blocks, N classes, C channels, I and O those in and out, H and W pixels, P pixels of
a tile, D inputs of a product.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import CIFAR_STAGES
from pipeline.inference.base import Executor, Networks, Output, UnavailableError
from pipeline.inference.fused import fold
from pipeline.models.policy_net import average_down
from pipeline.models.resnet import ResNet

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for some platforms
    triton = None

PIXEL = 4  # channels of an input pixel in the scratch: three and a zero
MIN_CHANNELS, MAX_CHANNELS = 16, 128  # the least that tl.dot takes, the most that a tile has room for
# Of the largest logit. Networks of up to 110 layers are off by 1e-6 in fp32 and by 1 % in bf16. A wrong
# index, weight or barrier gives errors as large as the logits, and TF32 in place of fp32 must show too.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
PROOF_IMAGES, PROOF_PROGRAMS = 5, 2  # several images a program: what one leaves behind must not show
# The fault that a proof found, "" for none, by device, precision and networks' shapes. The kernel and
# the layout of weights depend on nothing else, so a training's validations need one proof.
PROOFS: dict[tuple[str, str, str], str] = {}


def _jit(function: Any) -> Any:
    """triton.jit, where there is Triton. Arguments that vary between calls cause no recompilation."""
    if triton is None:
        return function
    varying = {"inputs", "actions", "action_stride", "batch"} & set(function.__annotations__)
    return triton.jit(do_not_specialize=sorted(varying))(function)


# In all kernels, how = (depth, sums, precision): see DEPTH, SUMS and PRODUCTS of TritonKernel.


@_jit
def _read(
    pixels: tl.tensor, dst: tl.tensor, height: tl.constexpr, width: tl.constexpr, how: tl.constexpr
) -> None:
    """An image [H, W, 3] float32 into the scratch."""
    tile: tl.constexpr = how[1] // 16
    channel = tl.arange(0, 4)[None, :]  # [1, 4]
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]  # [P, 1]
        mask = (pixel < height * width) & (channel < 3)  # [P, 4]
        value = tl.load(pixels + pixel * 3 + channel, mask=mask, other=0.0)
        to = dst + ((pixel // width + 1) * (width + 2) + pixel % width + 1) * 4 + channel
        tl.store(to, value.to(dst.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@_jit
def _conv(
    src: tl.tensor, dst: tl.tensor, weights: tl.tensor, biases: tl.tensor, height: tl.constexpr,
    width: tl.constexpr, cin: tl.constexpr, cout: tl.constexpr, stride: tl.constexpr, add: tl.constexpr,
    how: tl.constexpr,
) -> None:  # fmt: skip
    """To dst [H, W, O]: relu(conv(src)), or relu(dst + conv(src))."""
    row: tl.constexpr = 4 * cin if 4 * cin <= how[0] else 3 * cin
    depth: tl.constexpr = 4 * cin if 4 * cin <= how[0] else min(cin, how[0])
    pitch: tl.constexpr = (width * stride + 2) * cin  # of a row of src
    tile: tl.constexpr = how[1] // cout
    inner = tl.arange(0, depth)
    outer = tl.arange(0, cout)
    bias = tl.load(biases + outer)[None, :]  # [1, O]
    for start in range(0, height * width, tile):
        pixel = start + tl.arange(0, tile)  # [P]
        near = tl.minimum(pixel, height * width - 1)  # past the end: read the last pixel, store none
        y = near // width
        x = near % width
        # the top left tap of each pixel's 3x3 window: the border shifts src by one row and one column
        at = src + (y * (stride * pitch) + x * (stride * cin))[:, None] + inner[None, :]  # [P, D]
        to = dst + ((y + 1) * (width + 2) + x + 1)[:, None] * cout + outer[None, :]  # [P, O]
        w = weights + inner[:, None] * cout + outer[None, :]  # [D, O]
        total = tl.zeros((tile, cout), tl.float32) + bias  # [P, O]
        if add:
            total += tl.load(to).to(tl.float32)
        for ky in range(3):
            for k in range(0, row, depth):
                window = tl.load(at + (ky * pitch + k))  # [P, D], of the kernel's row ky
                factors = tl.load(w + (ky * (4 * cin) + k) * cout)  # [D, O]
                total = tl.dot(window, factors, total, input_precision=how[2])
        result = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch does
        tl.store(to, result.to(dst.dtype.element_ty), mask=(pixel < height * width)[:, None])
    tl.debug_barrier()


@_jit
def _pool_and_pad(
    src: tl.tensor, dst: tl.tensor, height: tl.constexpr, width: tl.constexpr, cin: tl.constexpr,
    cout: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """The shortcut where the shape changes: 2x2 averages of src, then channels of zeros."""
    pitch: tl.constexpr = (2 * width + 2) * cin
    tile: tl.constexpr = how[1] // cout
    channel = tl.arange(0, cout)[None, :]
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]  # [P, 1], of dst
        y = pixel // width
        x = pixel % width
        inside = pixel < height * width
        mask = inside & (channel < cin)  # [P, O]; the other channels are zeros
        at = src + (2 * y + 1) * pitch + (2 * x + 1) * cin + channel  # [P, O], top left of four pixels
        total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(at + cin, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(at + pitch, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(at + (pitch + cin), mask=mask, other=0.0).to(tl.float32)
        to = dst + ((y + 1) * (width + 2) + x + 1) * cout + channel
        tl.store(to, (total * 0.25).to(dst.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@_jit
def _block(
    actions: tl.tensor, src: tl.tensor, stream: tl.tensor, weights: tl.tensor, biases: tl.tensor,
    height: tl.constexpr, width: tl.constexpr, cin: tl.constexpr, inside: tl.constexpr,
    cout: tl.constexpr, stride: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """If its action says so, stream = relu(stream + conv(relu(conv(src)))).

    `inside` channels are between the two convolutions.

    All threads read the same action, so all or none come to the barriers inside.
    """
    if tl.load(actions) != 0:
        hidden = stream + (height + 2) * (width + 2) * cout
        _conv(src, hidden, weights, biases, height, width, cin, inside, stride, False, how)
        second = weights + 12 * cin * inside
        _conv(hidden, stream, second, biases + inside, height, width, inside, cout, 1, True, how)


@_jit
def _stage(
    actions: tl.tensor, src: tl.tensor, stream: tl.tensor, weights: tl.tensor, biases: tl.tensor,
    height: tl.constexpr, width: tl.constexpr, cin: tl.constexpr, inside: tl.constexpr,
    cout: tl.constexpr, stride: tl.constexpr, blocks: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """The blocks of a stage, from src to stream; the same buffer where the shape stays."""
    if stride == 2:
        _pool_and_pad(src, stream, height, width, cin, cout, how)
    _block(actions, src, stream, weights, biases, height, width, cin, inside, cout, stride, how)
    rest = weights + 12 * (cin + cout) * inside
    for block in range(1, blocks):
        _block(actions + block, stream, stream, rest + (block - 1) * (24 * inside * cout),
               biases + block * (inside + cout), height, width, cout, inside, cout, 1, how)  # fmt: skip


@_jit
def _head(
    stream: tl.tensor, weights: tl.tensor, biases: tl.tensor, logits: tl.tensor, outputs: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """Mean over the pixels, then the linear layer, weights [C, N], all in float32."""
    tile: tl.constexpr = how[1] // channels
    chunk: tl.constexpr = 32  # outputs at a time
    channel = tl.arange(0, channels)
    mean = tl.zeros((channels,), tl.float32)  # [C]
    for start in range(0, height * width, tile):
        pixel = (start + tl.arange(0, tile))[:, None]
        at = stream + ((pixel // width + 1) * (width + 2) + pixel % width + 1) * channels
        value = tl.load(at + channel[None, :], mask=pixel < height * width, other=0.0)
        mean += tl.sum(value.to(tl.float32), axis=0) / (height * width)
    for start in range(0, outputs, chunk):
        output = start + tl.arange(0, chunk)
        mask = output < outputs
        at = weights + channel[:, None] * outputs + output[None, :]  # [C, chunk]
        products = tl.load(at, mask=mask[None, :], other=0.0) * mean[:, None]
        bias = tl.load(biases + output, mask=mask, other=0.0)
        tl.store(logits + output, tl.sum(products, axis=0) + bias, mask=mask)
    tl.debug_barrier()


@_jit
def _forward(
    inputs: tl.tensor, actions: tl.tensor, action_stride: tl.tensor, weights: tl.tensor,
    biases: tl.tensor, fc_weight: tl.tensor, fc_bias: tl.tensor, logits: tl.tensor, scratch: tl.tensor,
    batch: tl.tensor, height: tl.constexpr, width: tl.constexpr, c0: tl.constexpr, c1: tl.constexpr,
    c2: tl.constexpr, i0: tl.constexpr, i1: tl.constexpr, i2: tl.constexpr, blocks: tl.constexpr,
    outputs: tl.constexpr, space: tl.constexpr, how: tl.constexpr,
) -> None:  # fmt: skip
    """Logits [B, N] of inputs [B, H, W, 3] under actions [B, K], image by image.

    c0, c1 and c2 are the stages' channels, i0 to i2 those inside their blocks, `blocks` are in
    each, `space` elements of scratch are a
    program's. There: the image, then a stage's stream and what lies between its convolutions.
    """
    h1: tl.constexpr = height // 2
    w1: tl.constexpr = width // 2
    h2: tl.constexpr = height // 4
    w2: tl.constexpr = width // 4
    weights0 = weights + 12 * 4 * c0
    weights1 = weights0 + 12 * 2 * blocks * c0 * i0
    weights2 = weights1 + 12 * (c0 + (2 * blocks - 1) * c1) * i1
    biases1 = biases + c0 + blocks * (i0 + c0)
    biases2 = biases1 + blocks * (i1 + c1)
    image = tl.program_id(0).to(tl.int64)  # so that offsets in large batches are int64, too
    pixels = scratch + image * space
    stream0 = pixels + (height + 2) * (width + 2) * 4
    stream1 = stream0 + 2 * (height + 2) * (width + 2) * c0
    stream2 = stream1 + 2 * (h1 + 2) * (w1 + 2) * c1
    while image < batch:
        acts = actions + image * action_stride
        _read(inputs + image * (height * width * 3), pixels, height, width, how)
        _conv(pixels, stream0, weights, biases, height, width, 4, c0, 1, False, how)
        _stage(acts, stream0, stream0, weights0, biases + c0, height, width, c0, i0, c0, 1, blocks, how)
        _stage(acts + blocks, stream0, stream1, weights1, biases1, h1, w1, c0, i1, c1, 2, blocks, how)
        _stage(
            acts + 2 * blocks, stream1, stream2, weights2, biases2, h2, w2, c1, i2, c2, 2, blocks, how
        )
        _head(stream2, fc_weight, fc_bias, logits + image * outputs, outputs, h2, w2, c2, how)
        image += tl.num_programs(0)


def _padded(channels: int) -> int:
    """The number of channels, rounded up to a power of two that tl.dot takes."""
    return max(MIN_CHANNELS, 1 << (channels - 1).bit_length())


class _Network:
    """A ResNet's weights in the kernel's layout, and the scratch for each size of its images."""

    def __init__(self, resnet: ResNet, dtype: torch.dtype) -> None:
        if resnet.family != "cifar":
            raise UnavailableError("it knows the blocks of CIFAR's ResNets alone, not ImageNet's")
        self.dtype = dtype
        self.blocks = resnet.num_blocks // CIFAR_STAGES
        self.channels = [_padded(resnet.width * 2**stage) for stage in range(CIFAR_STAGES)]
        if self.channels[-1] > MAX_CHANNELS:
            raise UnavailableError(f"{self.channels[-1]} channels are more than {MAX_CHANNELS}")
        blocks = resnet.flat_blocks()
        stages = [blocks[self.blocks * stage :][: self.blocks] for stage in range(CIFAR_STAGES)]
        # of a stage with pruned blocks: those of the block that has most
        self.inside = [
            _padded(max(block.convolutions()[0][0].out_channels for block in stage)) for stage in stages
        ]
        packed = [self._packed(resnet.conv1, resnet.bn1, PIXEL, self.channels[0])]
        cin = self.channels[0]
        for stage, inside, cout in zip(stages, self.inside, self.channels, strict=True):
            for block in stage:
                first, second = block.convolutions()
                packed += [self._packed(*first, cin, inside), self._packed(*second, inside, cout)]
                cin = cout
        self.weights = torch.cat([weight for weight, _ in packed])
        self.biases = torch.cat([bias for _, bias in packed])
        more = self.channels[-1] - resnet.fc.in_features
        self.fc_weight = F.pad(resnet.fc.weight.detach().float().t(), (0, 0, 0, more)).contiguous()
        self.fc_bias = resnet.fc.bias.detach().float().clone()
        self.every = torch.ones(1, resnet.num_blocks, dtype=torch.bool, device=self.biases.device)
        self.spaces: dict[tuple[int, int], Tensor] = {}

    def _packed(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, cin: int, cout: int) -> tuple[Tensor, Tensor]:
        """Weight [ky, kx, I, O], flat, with a fourth kx that is zero; bias [O] float32."""
        weight, bias = fold(conv, bn)
        more = cout - conv.out_channels
        weight = F.pad(weight.permute(2, 3, 1, 0), (0, more, 0, cin - conv.in_channels, 0, 1))
        return weight.to(self.dtype).flatten(), F.pad(bias, (0, more))

    def space(self, height: int, width: int, programs: int) -> Tensor:
        """Scratch [at least `programs`, elements]; its borders are zero from the start and stay so."""
        space = self.spaces.get((height, width))
        if space is None or len(space) < programs:
            elements = (height + 2) * (width + 2) * PIXEL
            for stage, channels in enumerate(self.channels):
                elements += 2 * ((height >> stage) + 2) * ((width >> stage) + 2) * channels
            elements += self.channels[-1]  # a fourth tap may lie one pixel past the end
            space = self.weights.new_zeros(programs, -(-elements // 64) * 64)
            self.spaces[height, width] = space
        return space


class TritonKernel(Executor):
    """On CUDA: the same few launches at any mix of policies. For one stream at a time.

    When it is built, it compiles (seconds) and is compared with float64 on random images, once in a
    process for networks of the same shapes.

    Raises:
        UnavailableError: no Triton, another device, too many channels, or a proof that fails.
    """

    name = "triton"
    PROGRAMS_PER_SM = 4
    NUM_WARPS = 4
    SUMS = 4096  # P x O of a tile, in registers; Hopper's own instructions need 64 pixels in 4 warps
    # D at most: a larger one needs fewer barriers, but more shared memory and registers. Without tensor
    # cores (fp32) a product is unrolled into single multiplications, so it must be short.
    DEPTH: ClassVar = {"fp32": 16, "bf16": 128}
    PRODUCTS: ClassVar = {"fp32": "ieee", "bf16": "ieee"}  # input_precision of tl.dot
    PROOF_SIDE = 32  # pixels

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        if triton is None:
            raise UnavailableError("Triton is not installed")
        on_cuda = self.device.type == "cuda"
        if not on_cuda and isinstance(_forward, triton.JITFunction):  # Triton's interpreter takes CPUs
            raise UnavailableError(f"it runs on CUDA, not on {self.device.type}")
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count if on_cuda else 1
        self.programs = sms * self.PROGRAMS_PER_SM
        self.resnet = _Network(networks.resnet, self.dtype)
        policy_net = networks.policy_net
        self.policy_net = None if policy_net is None else _Network(policy_net.features, self.dtype)
        self.scale, self.shift = networks.normalisation.scale_and_shift(self.device)
        self._prove()

    def free(self) -> None:
        for network in (self.resnet, self.policy_net):
            if network is not None:
                network.spaces.clear()

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        # scale and shift are on the device already: to copy them there would wait for it
        inputs = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        if actions is None:
            actions = self._decide(inputs)
        return Output(logits=self._classify(inputs, actions), actions=actions)

    def _decide(self, inputs: Tensor) -> Tensor:
        return self._policy_logits(inputs) >= 0

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        return self._logits(self.resnet, inputs, actions)

    def _policy_logits(self, inputs: Tensor) -> Tensor:
        assert self.policy_net is not None
        assert self.networks.policy_net is not None
        inputs = average_down(inputs, self.networks.policy_net.input_size)
        return self._logits(self.policy_net, inputs, self.policy_net.every)

    def _logits(self, network: _Network, inputs: Tensor, actions: Tensor) -> Tensor:
        """Logits [B, N] float32 of inputs [B, 3, H, W] under actions [B, K], or [1, K] for all."""
        batch, _, height, width = inputs.shape
        if height % 4 or width % 4:
            raise ValueError(f"images have {height} x {width} pixels, expected multiples of 4")
        rows = inputs.float().permute(0, 2, 3, 1).contiguous()
        actions = actions.contiguous().view(torch.uint8)
        programs = min(batch, self.programs)
        space = network.space(height, width, programs)
        outputs = len(network.fc_bias)
        logits = torch.empty(batch, outputs, device=self.device)
        how = (self.DEPTH[self.precision], self.SUMS, self.PRODUCTS[self.precision])
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _forward[(programs,)](
                rows, actions, actions.shape[1] if len(actions) > 1 else 0, network.weights,
                network.biases, network.fc_weight, network.fc_bias, logits, space, batch, height, width,
                *network.channels, *network.inside, network.blocks, outputs, space.shape[1], how,
                num_warps=self.NUM_WARPS, num_stages=1,  # 1: no loads ahead of their turn
            )  # fmt: skip
        return logits

    def _prove(self) -> None:
        """Compare it with the networks in float64, unless this process has done so before."""
        key = str(self.device), self.precision, self.networks.shapes
        if key not in PROOFS:
            PROOFS[key] = self._fault()
        if PROOFS[key]:
            raise UnavailableError(PROOFS[key])

    @torch.no_grad()
    def _fault(self) -> str:
        """The kernel's fault on random images, or ""."""
        draw = torch.Generator().manual_seed(0)
        shape = (PROOF_IMAGES, self.PROOF_SIDE, self.PROOF_SIDE, 3)
        images = torch.randint(256, shape, generator=draw).byte().to(self.device)
        actions = torch.rand(PROOF_IMAGES, self.networks.num_blocks, generator=draw) < 0.5
        actions[0], actions[1] = True, False
        actions = actions.to(self.device)
        inputs = self.networks.normalisation(images).double()
        expected = {"ResNet": _in_float64(self.networks.resnet)(inputs, actions)}
        if self.networks.policy_net is not None:
            expected["policy network"] = _in_float64(self.networks.policy_net)(inputs)
        programs, self.programs = self.programs, PROOF_PROGRAMS
        try:
            logits = {"ResNet": self._run(images, actions).logits}
            if self.policy_net is not None:
                logits["policy network"] = self._policy_logits(inputs)
            errors = {name: (logits[name] - expected[name]).abs().max() for name in logits}
            wrong = [
                f"{name} disagrees with float64 by {float(errors[name]):.2g}"
                for name in logits  # `not <=`, as NaN is a fault too
                if not errors[name] <= TOLERANCE[self.precision] * expected[name].abs().max()
            ]
        except torch.OutOfMemoryError as error:  # later there may be enough
            raise UnavailableError("no memory is left to prove the kernel") from error
        except Exception as error:  # whatever Triton, the compiler and the driver raise
            lines = str(error).strip().splitlines() or [""]
            return f"the kernel fails: {type(error).__name__}: {lines[-1]}"
        finally:
            self.programs = programs
        return f"the kernel's {', '.join(wrong)}" if wrong else ""


def _in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().eval()
