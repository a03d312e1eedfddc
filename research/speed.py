"""The benchmark without a training: a ResNet with random weights and a policy of a given keep ratio.

    python -m research.speed --depth 110 --keep-ratio 0.31 --out results/speed_r110_cpu.json

Time does not depend on the weights' values, so this measures what a trained policy of that keep ratio
would save on this machine. It needs neither DVC nor MLflow. Images are random colours, unless `--images`
names a prepared array.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import Family
from pipeline.benchmark.candidates import Settings
from pipeline.benchmark.runner import Benchmark
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device, describe_device, describe_machine, generator
from pipeline.flops import measure
from pipeline.inference.auto import EXECUTORS, make_executor
from pipeline.inference.base import Networks
from pipeline.inference.masked import Masked
from pipeline.infra.atomic_io import write_text
from pipeline.models.build import make_resnet
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.pruning.allocation import uniform
from pipeline.pruning.importance import l1_norms
from pipeline.pruning.surgery import cut, most_important
from pipeline.results import TimingRow
from tools.command import Parser, command

CLASSES = {"cifar": 10, "imagenet": 1000}
POLICY_NETS: dict[Family, dict[str, Any]] = {  # the authors'
    "cifar": {},
    "imagenet": {"family": "imagenet", "depth": 10, "width": 64, "input_size": 112},
}
NORMALISATION = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def random_images(number: int, size: int) -> Tensor:
    """Random colours that run into each other, [M, H, W, 3] uint8.

    To a network with random weights, images of independent pixels look all the same, so that roundings
    would decide about blocks and classes, and bf16 would not agree with fp32.
    """
    colours = 255 * torch.rand(number, 3, 4, 4, generator=generator("speed"))
    return F.interpolate(colours, size=size, mode="bilinear").permute(0, 2, 3, 1).byte().contiguous()


@torch.no_grad()
def decide_at_random(policy_net: PolicyNet, images: Tensor, keep_ratio: float) -> None:
    """Make the policy network keep each block on a fraction `keep_ratio` of the images.

    Its last layer becomes random directions in the whitened space of its features, so that the decisions
    of different blocks are nearly independent. Each bias is set to the quantile that gives the ratio.
    """
    features: list[Tensor] = []
    hook = policy_net.features.fc.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    for part in images.split(100):
        policy_net.eval()(NORMALISATION(part))
    hook.remove()
    x = torch.cat(features).double()  # [M, F]
    mean = x.mean(dim=0)
    _, scales, axes = torch.linalg.svd(x - mean, full_matrices=False)
    # along the others the images hardly differ, so that whitening would amplify rounding errors, and
    # executors would decide differently
    varied = scales > 1e-3 * scales.max()
    axes, scales = axes[varied], scales[varied]
    whiten = axes / scales[:, None] * len(x) ** 0.5  # [R, F]
    directions = torch.randn(policy_net.num_blocks, len(whiten), dtype=torch.float64)
    weight = directions @ whiten.cpu()  # [K, F]
    logits = (x - mean) @ weight.to(x.device).t()  # [M, K]
    threshold = logits.quantile(1 - keep_ratio, dim=0)
    fc = policy_net.features.fc
    fc.weight.copy_(weight)
    fc.bias.copy_(-threshold.cpu() - weight @ mean.cpu())


@torch.no_grad()
def classify_by_nearest(networks: Networks, images: Tensor) -> None:
    """Make each of the images its own class, as long as there are classes: the nearest one's wins.

    For features x_c of image c that is the largest of <x_c, x> - |x_c|^2 / 2. Under random weights the
    best of many classes is hardly ahead, and rounding to bf16 would turn a tenth of them.
    """
    fc = networks.resnet.fc
    features: list[Tensor] = []
    hook = fc.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    execute = make_executor(networks, name=Masked.name)
    for part in images[: fc.out_features].split(32):
        execute(part)
    hook.remove()
    x = torch.cat(features)
    mean = x.mean(dim=0)
    weight = x - mean  # small numbers, of which bf16 loses less
    fc.weight[: len(x)] = weight
    fc.bias[: len(x)] = -weight @ mean - weight.square().sum(dim=1) / 2


def settle_batch_norm(module: nn.Module, images: Tensor) -> None:
    """Set running statistics as a training would, so that activations keep a sensible size."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # the plain mean over what it has seen
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(NORMALISATION(images[:64]))
    module.eval()


def make_networks(arguments: argparse.Namespace, images: Tensor) -> tuple[Networks, ResNet]:
    """BlockDrop's networks, and the ResNet with every block: the same one, or that before pruning."""
    torch.manual_seed(0)
    family: Family = arguments.family
    sizes = {"depth": arguments.depth, "width": arguments.width, "num_classes": CLASSES[family]}
    full = make_resnet(family=family, **sizes).to(images.device)
    policy_net = PolicyNet(num_blocks=full.num_blocks, **POLICY_NETS[family]).to(images.device)
    for part in full, policy_net:
        settle_batch_norm(part, images)
    decide_at_random(policy_net, images, arguments.keep_ratio)
    resnet = full
    if arguments.prune:
        resnet = cut(full, most_important(l1_norms(full), uniform(full, arguments.prune)))
        settle_batch_norm(resnet, images)
    networks = Networks(resnet=resnet, policy_net=policy_net, normalisation=NORMALISATION)
    if family == "imagenet":
        classify_by_nearest(networks, images)
    return networks, full


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        batch_sizes=[int(size) for size in numbers(arguments.batches)],
        precisions=arguments.precisions.split(","),
        executors=arguments.executors.split(","),
        keep_ratios=numbers(arguments.keep_ratios),
        distinct_policies=4,
        sole_depths=[int(depth) for depth in numbers(arguments.sole)],
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        with_compile=arguments.compile,
    )


def show_times(rows: Sequence[TimingRow]) -> None:
    for row in rows:
        itself = f", {row.speedup_over_itself:.2f} of itself" if row.speedup_over_itself else ""
        print(
            f"  batch {row.batch:5} {row.precision} {row.candidate:20} "
            f"{row.time.milliseconds:9.3f} ms ({row.time.milliseconds_25:.3f} to "
            f"{row.time.milliseconds_75:.3f}), {row.time.images_per_second:10,.0f} images/s, "
            f"{row.speedup.ratio:.2f} of the best full-ResNet form{itself}"
        )


def write(arguments: argparse.Namespace, device: torch.device, benchmark: Benchmark) -> None:
    """Write the machine, the settings, and the tables as far as they are measured."""
    result = {
        "machine": describe_machine(device),
        "kept": arguments.keep_ratio,
        "pruned": arguments.prune,
        "family": arguments.family,
        "depth": arguments.depth,
        "width": arguments.width,
        "left_out": benchmark.left_out,
        "settings": asdict(benchmark.settings),
        **asdict(benchmark.tables),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")


def add_options(parser: Parser) -> None:
    parser.add_argument("--family", choices=get_args(Family), default="cifar")
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--width", type=int, help="16, or 64 of the family imagenet")
    parser.add_argument("--keep-ratio", "--kept", type=float, default=0.31, help="of the policy")
    parser.add_argument("--prune", type=float, default=0.0, help="of the channels inside the blocks")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--executors", default=",".join(EXECUTORS))
    parser.add_argument(
        "--keep-ratios", "--shares", default="0.1,0.3,0.5,0.7,0.9,1", help="of the sweep"
    )
    parser.add_argument("--sole", default="", help="depths of full ResNets beside, e.g. 20,32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--compile", action="store_true", help="torch.compile among the rivals")
    parser.add_argument("--images", type=Path, help="test images, [M, H, W, 3] uint8 .npy")
    parser.add_argument("--out", type=Path, help="JSON with everything measured")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print the answers, write the tables."""
    device = choose_device()
    arguments.width = arguments.width or {"cifar": 16, "imagenet": 64}[arguments.family]
    if arguments.images is None:
        number, size = {"cifar": (2000, 32), "imagenet": (256, 224)}[arguments.family]
        images = random_images(number, size)
    else:
        images = torch.from_numpy(np.load(arguments.images))
    images = images.to(device)
    networks, full = make_networks(arguments, images)
    print(f"speed: ResNet-{arguments.depth} on {describe_device(device)}", flush=True)
    benchmark = Benchmark(
        networks,
        full=full,
        images=images,
        cost=measure(networks.resnet, networks.policy_net, images.shape[1]),
        settings=settings_of(arguments),
    )

    def report(line: str) -> None:
        print(f"speed: {line}", flush=True)
        if arguments.out is not None:  # after every part, so that a kill loses no measurement
            write(arguments, device, benchmark)

    show_times(benchmark.run(report).times)
    if arguments.out is not None:
        print(f"speed: {arguments.out}")


if __name__ == "__main__":
    main()
