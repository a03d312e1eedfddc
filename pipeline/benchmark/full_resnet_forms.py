"""The full ResNet, every block on every image, in each form that might be the fastest.

Shapes: B images, N classes, H and W pixels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.benchmark.peers import PEERS
from pipeline.data.transforms import scaled
from pipeline.device import autocast
from pipeline.inference.base import Networks
from pipeline.inference.cuda_graphs import Captures, Replay
from pipeline.inference.fused import FusedNetwork

Classify = Callable[[Tensor], Tensor]  # images [B, H, W, 3] uint8 to logits [B, N]
COMPILED = {"compiled", *PEERS}  # forms whose first call at a batch size takes long


def eager(networks: Networks, precision: str) -> Classify:
    """The module as one writes it: PyTorch, channels_last, evaluation mode."""
    networks.resnet.eval()
    scale, shift = networks.normalisation.scale_and_shift(networks.device)  # not to be compiled

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with autocast(networks.device, precision):
            return networks.resnet(scaled(images, scale, shift)).float()

    return run


def fused(networks: Networks, precision: str) -> Classify:
    """Batch norm folded, convolutions fused with ReLUs, one batch over all cores."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network = FusedNetwork(networks.resnet, dtype)

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        inputs = networks.normalisation(images).to(dtype)
        return network.forward(inputs.contiguous(memory_format=torch.channels_last))

    return run


def compiled(networks: Networks, precision: str) -> Classify:
    """The eager form by torch.compile in its slowest-to-compile mode, for one batch size at a time."""
    return torch.compile(eager(networks, precision), mode="max-autotune", dynamic=False)


class WholeGraph:
    """The fused form as a CUDA graph for each batch size: no launch costs.

    The logits that it returns hold until its next call.
    """

    def __init__(self, networks: Networks, precision: str) -> None:
        self.run = fused(networks, precision)
        self.free()

    def free(self) -> None:
        self.graphs: dict[int, tuple[Replay, Tensor, Tensor]] = {}
        self.capture = Captures()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, N] of images [B, H, W, 3] uint8."""
        if len(images) not in self.graphs:
            read, outputs = images.clone(), list[Tensor]()
            replay = self.capture(lambda: outputs.append(self.run(read)))
            self.graphs[len(images)] = replay, read, outputs[-1]
        replay, inputs, logits = self.graphs[len(images)]
        inputs.copy_(images)
        replay()
        return logits


def full_resnet_forms(
    networks: Networks, precision: str, *, with_compile: bool
) -> dict[str, Callable[[], Classify]]:
    """What makes each form for this device, by name; executors that run every block come on top.

    Making one raises UnavailableError where its engine is not installed.
    """
    forms: dict[str, Callable[[Networks, str], Classify]] = {"eager": eager, "fused": fused}
    if with_compile:
        forms["compiled"] = compiled
    if networks.device.type == "cuda":
        forms["whole graph"] = WholeGraph  # `cuda_graphs` is the executor's name
    else:
        forms |= PEERS
    return {name: partial(make, networks, precision) for name, make in forms.items()}
