"""The authors' networks for ImageNet as functions of their named weights, to compare imports with."""

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
CHANNELS = (1, 2, 4, 8)  # of the stages, times the width


def make(sizes: tuple[int, ...], width: int, *, bottleneck: bool, seed: int) -> Weights:
    """Random weights of the trunk, as PyTorch 0.3 names them: no batch counters, no last layer."""
    draw = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def convolution(name: str, into: int, out: int, side: int) -> None:
        scale = (2 / (into * side * side)) ** 0.5
        weights[f"{name}.weight"] = scale * torch.randn(out, into, side, side, generator=draw)

    def norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=draw)
        weights[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=draw)
        weights[f"{name}.running_mean"] = 0.2 * torch.randn(channels, generator=draw)
        weights[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=draw)

    convolution("conv1", 3, width, 7)
    norm("bn1", width)
    into, expansion = width, 4 if bottleneck else 1
    for stage, (count, times) in enumerate(zip(sizes, CHANNELS, strict=True)):
        inner, out = width * times, width * times * expansion
        sides = ((1, inner), (3, inner), (1, out)) if bottleneck else ((3, inner), (3, inner))
        if stage or into != out:
            convolution(f"ds.{stage}.0", into, out, 1)
            norm(f"ds.{stage}.1", out)
        for block in range(count):
            at = into
            for number, (side, channels) in enumerate(sides, start=1):
                convolution(f"blocks.{stage}.{block}.conv{number}", at, channels, side)
                norm(f"blocks.{stage}.{block}.bn{number}", channels)
                at = channels
            into = out
    return weights


def linear(name: str, into: int, out: int, seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=draw) / into**0.5
    return {f"{name}.weight": weight, f"{name}.bias": torch.randn(out, generator=draw)}


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _branch(weights: Weights, at: str, x: Tensor, stride: int) -> Tensor:
    last = 3 if f"{at}.conv3.weight" in weights else 2
    for number in range(1, last + 1):
        kernel = weights[f"{at}.conv{number}.weight"]
        strides = number == (2 if last == 3 else 1)  # the bottleneck's 3x3, a basic block's first
        x = F.conv2d(x, kernel, stride=stride if strides else 1, padding=kernel.shape[-1] // 2)
        x = _norm(weights, f"{at}.bn{number}", x)
        x = F.relu(x) if number < last else x
    return x


def features(weights: Weights, x: Tensor, policy: Tensor | None = None) -> Tensor:
    """Pooled features of images [B, 3, H, W], under actions [B, K] where there are some."""
    x = F.conv2d(x, weights["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(_norm(weights, "bn1", x)), 3, stride=2, padding=1)
    index = 0
    for stage in range(4):
        block = 0
        while f"blocks.{stage}.{block}.conv1.weight" in weights:
            stride = 2 if stage and not block else 1
            shortcut = x
            if not block and f"ds.{stage}.0.weight" in weights:
                kernel = weights[f"ds.{stage}.0.weight"]
                shortcut = _norm(weights, f"ds.{stage}.1", F.conv2d(x, kernel, stride=stride))
            run = F.relu(shortcut + _branch(weights, f"blocks.{stage}.{block}", x, stride))
            kept = None if policy is None else policy[:, index, None, None, None].to(x.dtype)
            x = run if kept is None else run * kept + shortcut * (1 - kept)
            block, index = block + 1, index + 1
    return x.mean(dim=(2, 3))


def classify(resnet: Weights, x: Tensor, policy: Tensor) -> Tensor:
    """Class logits under the policy."""
    return F.linear(features(resnet, x, policy), resnet["fc.weight"], resnet["fc.bias"])


def decide(agent: Weights, x: Tensor) -> Tensor:
    """The policy's logits, of images halved as the authors halve them."""
    trunk = {name.removeprefix("features."): t for name, t in agent.items() if "features." in name}
    seen = features(trunk, F.avg_pool2d(x, 2))
    return F.linear(seen, agent["logit.weight"], agent["logit.bias"])


def pair(sizes: tuple[int, ...], *, width: int, classes: int) -> tuple[Weights, Weights]:
    """`resnet` and `agent` of a finetuned file."""
    resnet = make(sizes, width, bottleneck=True, seed=0)
    resnet |= linear("fc", 32 * width, classes, seed=1)
    trunk = make((1, 1, 1, 1), width, bottleneck=False, seed=2)
    agent = {f"features.{name}": tensor for name, tensor in trunk.items()}
    agent |= linear("logit", 8 * width, sum(sizes), seed=3) | linear("vnet", 8 * width, 1, seed=4)
    return resnet, agent


def as_torchvision(resnet: Weights) -> Weights:
    """The ResNet that the authors began with has torchvision's names."""
    named = {}
    for name, tensor in resnet.items():
        kind, *rest = name.split(".")
        if kind == "ds":
            name = ".".join([f"layer{int(rest[0]) + 1}", "0", "downsample", *rest[1:]])
        elif kind == "blocks":
            name = ".".join([f"layer{int(rest[0]) + 1}", *rest[1:]])
        named[name] = tensor
    return named
