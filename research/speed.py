"""The benchmark without a training: a ResNet with random weights whose policy keeps a given share.

    python -m tools.speed --depth 110 --kept 0.31 --out results/speed_cpu.json

Time does not depend on what the weights have learnt, so this says what a trained policy of that kept
share would give on this machine. It needs PyTorch alone, neither DVC nor MLflow. Images are random
pixels, unless `--images` names a prepared array.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.benchmark.candidates import Settings
from pipeline.benchmark.runner import Benchmark
from pipeline.data.transforms import Normalisation
from pipeline.device import choose_device, describe_device, describe_machine, generator
from pipeline.flops import measure
from pipeline.inference.auto import EXECUTORS
from pipeline.inference.base import Networks
from pipeline.infra.errors import UserError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from tools.command import Parser

NORMALISATION = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@torch.no_grad()
def decide_at_random(policy_net: PolicyNet, images: Tensor, kept: float) -> None:
    """Make the policy network keep each block on a share `kept` of the images, nearly independently.

    Its last layer becomes random directions in the whitened space of its features, so that the decisions
    of different blocks have little in common, with each bias at that quantile.
    """
    features: list[Tensor] = []
    hook = policy_net.features.fc.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    for part in images.split(500):
        policy_net.eval()(NORMALISATION(part))
    hook.remove()
    found = torch.cat(features).double()
    mean = found.mean(dim=0)
    _, scales, axes = torch.linalg.svd(found - mean, full_matrices=False)
    whiten = axes / scales.clamp_min(1e-6 * scales.max())[:, None] * len(found) ** 0.5
    weight = torch.randn(policy_net.num_blocks, len(whiten), dtype=torch.float64) @ whiten.cpu()
    logits = (found - mean) @ weight.to(found.device).t()
    threshold = logits.quantile(1 - kept, dim=0)
    fc = policy_net.features.fc
    fc.weight.copy_(weight)
    fc.bias.copy_(-threshold.cpu() - weight @ mean.cpu())


def settle_batch_norm(module: nn.Module, images: Tensor) -> None:
    """Running statistics as after a training, so that activations keep a sensible size."""
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(NORMALISATION(images[:256]))
    module.eval()


def make_networks(depth: int, width: int, kept: float, images: Tensor) -> tuple[Networks, ResNet]:
    """The pair, and the full network beside it."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=depth, width=width).to(images.device)
    policy_net = PolicyNet(num_blocks=resnet.num_blocks).to(images.device)
    for part in resnet, policy_net:
        for norm in (m for m in part.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # the plain mean over what it has seen
        settle_batch_norm(part, images)
    decide_at_random(policy_net, images, kept)
    return Networks(resnet=resnet, policy_net=policy_net, normalisation=NORMALISATION), resnet


def numbers(text: str) -> list[float]:
    """`1,2,3` as numbers."""
    return [float(part) for part in text.split(",") if part]


def main() -> None:
    """Print the answers, write the tables."""
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--kept", type=float, default=0.31, help="share of the blocks")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--executors", default=",".join(EXECUTORS))
    parser.add_argument("--shares", default="0.1,0.3,0.5,0.7,0.9,1", help="of the sweep")
    parser.add_argument("--sole", default="", help="depths of full ResNets beside, e.g. 20,32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--compile", action="store_true", help="torch.compile among the rivals")
    parser.add_argument("--images", type=Path, help="test images, [M, H, W, 3] uint8 .npy")
    parser.add_argument("--out", type=Path, help="JSON with everything measured")
    args = parser.parse_args()
    try:
        device = choose_device()
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    if args.images is None:
        images = torch.randint(256, (2000, 32, 32, 3), generator=generator("speed")).byte()
    else:
        images = torch.from_numpy(np.load(args.images))
    images = images.to(device)
    networks, full = make_networks(args.depth, args.width, args.kept, images)
    settings = Settings(
        batch_sizes=[int(size) for size in numbers(args.batches)],
        precisions=args.precisions.split(","),
        executors=args.executors.split(","),
        keep_ratios=numbers(args.shares),
        distinct_policies=4,
        sole_depths=[int(depth) for depth in numbers(args.sole)],
        rounds=args.rounds,
        seconds=args.seconds,
        with_compile=args.compile,
    )
    print(f"speed: ResNet-{args.depth} on {describe_device(device)}", flush=True)
    cost = measure(networks.resnet, networks.policy_net, images.shape[1])
    benchmark = Benchmark(networks, full=full, images=images, cost=cost, settings=settings)

    def say(line: str) -> None:
        print(f"speed: {line}", flush=True)
        if args.out is not None:  # after every part: what is measured is not lost
            write(args, device, benchmark)

    tables = benchmark.run(say)
    for row in tables.times:
        itself = f", {row.speedup_over_itself:.2f} of itself" if row.speedup_over_itself else ""
        print(
            f"  batch {row.batch:5} {row.precision} {row.candidate:20} "
            f"{row.time.milliseconds:9.3f} ms ({row.time.milliseconds_25:.3f} to "
            f"{row.time.milliseconds_75:.3f}), {row.time.images_per_second:10,.0f} images/s, "
            f"{row.speedup.ratio:.2f} of the best full-ResNet form{itself}"
        )
    if args.out is not None:
        print(f"speed: {args.out}")


def write(args: argparse.Namespace, device: torch.device, benchmark: Benchmark) -> None:
    """The machine, the settings, and the tables as far as they are."""
    result = {
        "machine": describe_machine(device),
        "kept": args.kept,
        "depth": args.depth,
        "width": args.width,
        "left_out": benchmark.left_out,
        "settings": asdict(benchmark.settings),
        **asdict(benchmark.tables),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
