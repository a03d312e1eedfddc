"""Images per second of each training stage, beside a plain loop: `python -m research.throughput`.

The plain loop is what one would write first, and what the authors' code does: a DataLoader that augments
image by image with torchvision, float32 (on CUDA with TF32, PyTorch's default), contiguous tensors,
every block computed for every image and masked where it is dropped, a greedy and a sampled pass. Ours is
the code of the stages, once with the paper's estimator and once with the one that trains faster. The
loops take turns on the same images, so that a change of the machine's speed affects all of them.

With `--decode FOLDER` it measures how many of a folder's images one process decodes and crops for
ImageNet.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from pipeline.data.split import Split
from pipeline.data.streaming import Listing, Reader
from pipeline.data.transforms import Augmentation, Normalisation
from pipeline.device import choose_device, describe_machine
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.policy import objectives as pg
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.training.classification import Classification
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Learner, Position, fit, steps_per_epoch
from pipeline.training.optim import ChainedOptimizer, constant, make_optimizer
from tools.command import Parser, command

NORMALISATION = Normalisation(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
STAGES = ("pretrain", "curriculum", "finetune")
ALPHA, GAMMA, CLASSES = 0.8, 5.0, 10
SUFFIXES = (".jpg", ".jpeg", ".png")
Epoch = Callable[[], None]  # trains one epoch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which loops are measured."""

    stages: Sequence[str]
    depth: int
    keep_ratio: float  # fraction of the blocks that the policies keep
    images: int  # of an epoch
    batch_size: int
    rounds: int
    workers: Sequence[int]  # numbers of DataLoader processes, each of which is a plain loop of its own


@dataclass(frozen=True, kw_only=True)
class LoopRate:
    """Images per second of one loop: median, least and most over the rounds."""

    stage: str
    loop: str
    images_per_second: float
    least: float
    most: float
    times_the_best_plain: float

    def __str__(self) -> str:
        return (
            f"{self.stage:<11} {self.loop:<28} {self.images_per_second:8.0f} images/s "
            f"({self.least:.0f} to {self.most:.0f}), "
            f"{self.times_the_best_plain:.2f} times the best plain loop"
        )


class Images(Dataset[tuple[Tensor, Tensor]]):
    """One image at a time, augmented and normalised by torchvision."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.transform = v2.Compose(
            [
                v2.RandomCrop(split.image_size, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(NORMALISATION.mean, NORMALISATION.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.split.images[index].permute(2, 0, 1).contiguous()
        return self.transform(image), self.split.labels[index]


def masked(resnet: ResNet, images: Tensor, actions: Tensor) -> Tensor:
    """The logits, with every block computed on every image and masked where the action is 0."""
    x = F.relu(resnet.bn1(resnet.conv1(images)))
    for block, column in zip(resnet.flat_blocks(), actions.float().unbind(1), strict=True):
        shortcut = block.shortcut(x)
        keep = column[:, None, None, None]
        x = keep * F.relu(shortcut + block.residual(x)) + (1 - keep) * shortcut
    return resnet.head(x)


class Plain:
    """The plain loop of one stage."""

    def __init__(self, stage: str, networks: tuple[ResNet, PolicyNet], loader: Any) -> None:
        self.stage, self.loader = stage, loader
        resnet, policy_net = networks
        self.resnet = resnet.to(memory_format=torch.contiguous_format)
        self.policy_net = policy_net.to(memory_format=torch.contiguous_format)
        learning: list[nn.Module] = [self.resnet] if stage != "curriculum" else []
        learning += [self.policy_net] if stage != "pretrain" else []
        self.optimizer = torch.optim.Adam([p for net in learning for p in net.parameters()], lr=1e-3)
        self.device = next(self.resnet.parameters()).device

    def __call__(self) -> None:
        allow_tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
        try:
            for images, labels in self.loader:
                loss = self._loss(images.to(self.device), labels.to(self.device))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss.item()  # most loops print it
        finally:
            torch.backends.cudnn.allow_tf32 = allow_tf32

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.stage == "pretrain":
            self.resnet.train()
            all_blocks = torch.ones(len(images), self.resnet.num_blocks, device=images.device)
            return F.cross_entropy(masked(self.resnet, images, all_blocks), labels)
        prob = torch.sigmoid(self.policy_net.train()(images))
        sampling = pg.bounded_sampling_prob(prob, ALPHA)
        sampled = torch.bernoulli(sampling.detach()).bool()
        greedy = prob.detach() > 0.5
        jointly = self.stage == "finetune"
        with torch.no_grad():
            correct = masked(self.resnet.eval(), images, greedy).argmax(dim=1) == labels
            baseline = pg.reward(correct, greedy, GAMMA)
        self.resnet.train(jointly)
        with torch.set_grad_enabled(jointly):
            logits = masked(self.resnet, images, sampled)
        advantage = pg.reward(logits.argmax(dim=1) == labels, sampled, GAMMA) - baseline
        loss = pg.policy_gradient_loss(pg.log_prob(sampled, sampling), advantage)
        return loss + F.cross_entropy(logits, labels) if jointly else loss


def networks(depth: int, keep_ratio: float, device: torch.device) -> tuple[ResNet, PolicyNet]:
    """A ResNet and a policy network that keeps about that fraction of the blocks, random weights."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=depth, num_classes=CLASSES).to(device)
    policy_net = PolicyNet(num_blocks=resnet.num_blocks, width=8, initial_keep_prob=keep_ratio)
    return resnet, policy_net.to(device)


def learner_of(
    stage: str, depth: int, keep_ratio: float, device: torch.device, *, fast: bool
) -> Learner:
    """The stage's learner, with the paper's estimator or the fast one."""
    resnet, policy_net = networks(depth, keep_ratio, device)
    adam, of_policy = (
        make_optimizer("adam", [{"params": list(net.parameters()), "lr": 1e-3}], weight_decay=0)
        for net in (resnet, policy_net)
    )
    if stage == "pretrain":
        return Classification(resnet, optimizer=adam, normalisation=NORMALISATION, precision="bf16")
    finetune = stage == "finetune"
    estimator = ("reinmax" if finetune else "local_expectation") if fast else "self_critical"
    distillation = Distillation(
        resnet, teacher_weight=0.5 if fast else 0.0, normalisation=NORMALISATION, precision="bf16"
    )
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=ChainedOptimizer(of_policy, adam) if finetune else of_policy,
        objective=PolicyObjective(
            gamma=GAMMA, alpha=ALPHA, entropy_coef=0.0, estimator=estimator, num_flips=4
        ),
        normalisation=NORMALISATION,
        precision="bf16",
        distillation=distillation if finetune else None,
    )


def our_loop(learner: Learner, split: Split, batch_size: int) -> Epoch:
    """An epoch of the stage's own loop, without the validation, which the plain loop does not have."""

    def run() -> None:
        steps = fit(
            learner,
            train=split,
            validation=split,
            epochs=1,
            batch_size=batch_size,
            schedule=constant,
            augmentation=Augmentation(crop_padding=4, flip=True),
            normalisation=NORMALISATION,
            key=(0, "throughput"),
            position=Position(),
        )
        for _ in itertools.islice(steps, steps_per_epoch(len(split), batch_size)):
            pass  # after the last step validation would follow

    return run


def measure(options: Options, device: torch.device) -> list[LoopRate]:
    """The rate of every loop of every stage, on random images."""
    rng = torch.Generator().manual_seed(0)
    shape = (options.images, 32, 32, 3)
    split = Split(
        images=torch.randint(256, shape, dtype=torch.uint8, generator=rng),
        labels=torch.randint(CLASSES, (options.images,), generator=rng),
    )
    rates = []
    for stage in options.stages:
        loops = plain_loops(stage, split, options, device) | our_loops(stage, split, options, device)
        for rate in loop_rates(stage, timed(loops, options, device)):
            print(rate, flush=True)
            rates.append(rate)
    return rates


def plain_loops(stage: str, split: Split, options: Options, device: torch.device) -> dict[str, Epoch]:
    loops: dict[str, Epoch] = {}
    for workers in options.workers:
        loader = DataLoader(
            Images(split), batch_size=options.batch_size, shuffle=True, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        )  # fmt: skip
        pair = networks(options.depth, options.keep_ratio, device)
        loops[f"plain, {workers} workers"] = Plain(stage, pair, loader)
    return loops


def our_loops(stage: str, split: Split, options: Options, device: torch.device) -> dict[str, Epoch]:
    on_device = Split(images=split.images.to(device), labels=split.labels.to(device))

    names = {"ours, the paper's estimator": False, "ours, the fast estimator": True}
    if stage == "pretrain":  # there is no policy to estimate a gradient for
        names = {"ours": False}
    learners = {
        name: learner_of(stage, options.depth, options.keep_ratio, device, fast=fast)
        for name, fast in names.items()
    }
    return {name: our_loop(one, on_device, options.batch_size) for name, one in learners.items()}


def timed(loops: dict[str, Epoch], options: Options, device: torch.device) -> dict[str, list[float]]:
    """Images per second of each loop in each round, in which the loops take turns."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for round_number in range(options.rounds + 1):
        for name, run_epoch in loops.items():
            started = time.perf_counter()
            run_epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first one warms up
                rates[name].append(options.images / (time.perf_counter() - started))
    return rates


def loop_rates(stage: str, rates: dict[str, list[float]]) -> list[LoopRate]:
    best_plain = max(statistics.median(r) for name, r in rates.items() if name.startswith("plain"))
    return [
        LoopRate(
            stage=stage,
            loop=name,
            images_per_second=round(statistics.median(of_rounds), 1),
            least=round(min(of_rounds), 1),
            most=round(max(of_rounds), 1),
            times_the_best_plain=round(statistics.median(of_rounds) / best_plain, 2),
        )
        for name, of_rounds in rates.items()
    ]


def decoding(folder: Path, *, rounds: int, images: int, size: int = 224) -> list[dict[str, Any]]:
    """One row: images per second that one process reads, decodes and crops for training.

    Raises:
        UserError: there are no images in the folder.
    """
    paths = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}); name a folder of some")
    sizes = np.array([(folder / name).stat().st_size for name in paths])
    labels = np.zeros(len(paths), dtype=np.int64)
    reader = Reader(folder, Listing(paths=paths, labels=labels, sizes=sizes), size)
    rates = []
    for round_number in range(rounds + 1):
        started = time.perf_counter()
        for seed in range(images):
            reader[seed % len(paths), seed, True]
        if round_number:  # the first one warms up
            rates.append(images / (time.perf_counter() - started))
    median = statistics.median(rates)
    print(f"decoding: {median:.0f} images/s a process ({min(rates):.0f} to {max(rates):.0f})")
    return [{"stage": "decoding", "images_per_second": round(median, 1), "rounds": rounds}]


def add_options(parser: Parser) -> None:
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--keep-ratio", "--kept", type=float, default=0.6, help="of the policies")
    parser.add_argument("--images", type=int, default=2560, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the DataLoader")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--decode", type=Path, metavar="FOLDER", help="measure this instead")
    parser.add_argument("--out", type=Path)


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    device = choose_device()
    rows: list[dict[str, Any]]
    if arguments.decode is not None:
        rows = decoding(arguments.decode, rounds=arguments.rounds, images=arguments.images)
    else:
        options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
        rows = [asdict(rate) for rate in measure(options, device)]
    if arguments.out is not None:
        content = {
            "machine": describe_machine(device), "rows": rows,
            "command": "python -m research.throughput " + " ".join(Path(a).name for a in sys.argv[1:]),
        }  # fmt: skip
        write_text(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
