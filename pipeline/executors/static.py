"""Honest peers: the full ResNet, every block on every image, in each form that might be the fastest.

Shapes: B images, N classes, H and W pixels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.executors.base import Networks
from pipeline.executors.packed import PackedNetwork
from pipeline.runtime import autocast
from pipeline.tensors import scaled

Classify = Callable[[Tensor], Tensor]  # images [B, H, W, 3] uint8 to logits [B, N]


def eager(networks: Networks, precision: str) -> Classify:
    """The module as one writes it: PyTorch, channels_last, evaluation mode."""
    networks.resnet.eval()
    scale, shift = networks.normalisation.scale_and_shift(networks.device)  # not to be compiled

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with autocast(networks.device, precision):
            return networks.resnet(scaled(images, scale, shift)).float()

    return run


def packed(networks: Networks, precision: str) -> Classify:
    """Batch norm folded, convolutions fused with ReLUs, one batch over all cores."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network = PackedNetwork(networks.resnet, dtype)

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        inputs = networks.normalisation(images).to(dtype)
        return network.forward(inputs.contiguous(memory_format=torch.channels_last))

    return run


def compiled(networks: Networks, precision: str) -> Classify:
    """The eager form by torch.compile in its slowest-to-compile mode, for one batch size at a time."""
    return torch.compile(eager(networks, precision), mode="max-autotune", dynamic=False)


def graphed(networks: Networks, precision: str) -> Classify:
    """The packed form as a CUDA graph for each batch size: no launch costs."""
    run = packed(networks, precision)
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def capture(images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        held = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is set up lazily must not be captured
            for _ in range(3):
                run(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run(held)
        return graph, held, logits

    def replay(images: Tensor) -> Tensor:
        if len(images) not in graphs:
            graphs[len(images)] = capture(images)
        graph, held, logits = graphs[len(images)]
        held.copy_(images)
        graph.replay()
        return logits

    return replay


def static_forms(
    networks: Networks, precision: str, *, with_compile: bool
) -> dict[str, Callable[[], Classify]]:
    """What makes each form for this device, by name; an executor's own full form comes on top."""
    forms = {"eager": eager, "packed": packed}
    if with_compile:
        forms["compiled"] = compiled
    if networks.device.type == "cuda":
        forms["graphed"] = graphed
    return {name: partial(make, networks, precision) for name, make in forms.items()}
