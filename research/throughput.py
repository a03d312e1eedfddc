"""Images per second of each training stage, beside a plain loop: `python -m tools.throughput`.

The plain loop is what one would write first, and what the authors' code comes down to: a DataLoader that
augments image by image with torchvision, float32 (on CUDA with TF32, PyTorch's default), contiguous
tensors, every block computed for every image and the dropped ones thrown away (their masked form), a
greedy and a sampled pass. Ours is the very code of the stages, once with the same estimator and once
with the one that trains faster. Both take turns on the same images, so that a change of the machine's
speed hits both alike.

With `--decode FOLDER`: how many of a folder's images one process decodes and crops for ImageNet.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
from pipeline.training.loop import Learner, Position, fit
from pipeline.training.optim import ChainedOptimizer, constant, make_optimizer
from tools.command import Parser, mendable

NORMALISATION = Normalisation(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
STAGES = ("pretrain", "curriculum", "finetune")
ALPHA, GAMMA, CLASSES = 0.8, 5.0, 10
SUFFIXES = (".jpg", ".jpeg", ".png")
Run = Callable[[], None]


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
    """Every block on every image, its result thrown away where the action is 0."""
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
        self.resnet, self.policy_net = (
            net.to(memory_format=torch.contiguous_format) for net in networks
        )
        learning: list[nn.Module] = [self.resnet] if stage != "curriculum" else []
        learning += [self.policy_net] if stage != "pretrain" else []
        self.optimizer = torch.optim.Adam([p for net in learning for p in net.parameters()], lr=1e-3)
        self.device = next(self.resnet.parameters()).device

    def __call__(self) -> None:
        """One epoch."""
        exact = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it unless it is asked otherwise
        try:
            for images, labels in self.loader:
                loss = self._loss(images.to(self.device), labels.to(self.device))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss.item()  # most loops print it
        finally:
            torch.backends.cudnn.allow_tf32 = exact

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.stage == "pretrain":
            self.resnet.train()
            every = torch.ones(len(images), self.resnet.num_blocks, device=images.device)
            return F.cross_entropy(masked(self.resnet, images, every), labels)
        prob = torch.sigmoid(self.policy_net.train()(images))
        sampling = pg.bounded_sampling_prob(prob, ALPHA)
        sampled = torch.bernoulli(sampling.detach()).bool()
        greedy = prob.detach() > 0.5
        learn = self.stage == "finetune"
        with torch.no_grad():
            right = masked(self.resnet.eval(), images, greedy).argmax(dim=1) == labels
            baseline = pg.reward(right, greedy, GAMMA)
        self.resnet.train(learn)
        with torch.set_grad_enabled(learn):
            logits = masked(self.resnet, images, sampled)
        advantage = pg.reward(logits.argmax(dim=1) == labels, sampled, GAMMA) - baseline
        loss = pg.policy_gradient_loss(pg.log_prob(sampled, sampling), advantage)
        return loss + F.cross_entropy(logits, labels) if learn else loss


def networks(depth: int, kept: float, device: torch.device) -> tuple[ResNet, PolicyNet]:
    """A ResNet and a policy network that keeps about that share of the blocks, random weights."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=depth, num_classes=CLASSES).to(device)
    policy_net = PolicyNet(num_blocks=resnet.num_blocks, width=8, initial_keep_prob=kept).to(device)
    return resnet, policy_net


def learner_of(stage: str, depth: int, kept: float, device: torch.device, *, fast: bool) -> Learner:
    """What the stage trains with; `fast`: with the estimator that is not the paper's."""
    resnet, policy_net = networks(depth, kept, device)
    adam = make_optimizer("adam", [{"params": list(resnet.parameters()), "lr": 1e-3}], weight_decay=0)
    if stage == "pretrain":
        return Classification(resnet, optimizer=adam, normalisation=NORMALISATION, precision="bf16")
    of_policy = make_optimizer(
        "adam", [{"params": list(policy_net.parameters()), "lr": 1e-3}], weight_decay=0
    )
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


class Ours:
    """An epoch of the stage's own loop; validation, which the plain loop has not, is left out."""

    def __init__(self, learner: Learner, split: Split, batch_size: int) -> None:
        self.learner, self.split, self.batch_size = learner, split, batch_size

    def __call__(self) -> None:
        """One epoch."""
        for done in self._steps():
            if done:
                return

    def _steps(self) -> Iterator[bool]:
        steps = -(-len(self.split) // self.batch_size)
        todo = fit(
            self.learner,
            train=self.split,
            validation=self.split,
            epochs=1,
            batch_size=self.batch_size,
            schedule=constant,
            augmentation=Augmentation(crop_padding=4, flip=True),
            normalisation=NORMALISATION,
            key=(0, "throughput"),
            position=Position(),
        )
        for number, _ in enumerate(todo, start=1):
            yield number == steps


def measure(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each stage and loop: images per second, median and range over the rounds."""
    draw = torch.Generator().manual_seed(0)
    shape = (arguments.images, 32, 32, 3)
    split = Split(
        images=torch.randint(256, shape, dtype=torch.uint8, generator=draw),
        labels=torch.randint(CLASSES, (arguments.images,), generator=draw),
    )
    here = Split(images=split.images.to(device), labels=split.labels.to(device))
    rows = []
    for stage in arguments.stages:
        runs: dict[str, Run] = {}
        for workers in arguments.workers:
            loader = DataLoader(
                Images(split), batch_size=arguments.batch_size, shuffle=True, num_workers=workers,
                persistent_workers=workers > 0, pin_memory=device.type == "cuda",
            )  # fmt: skip
            nets = networks(arguments.depth, arguments.kept, device)
            runs[f"plain, {workers} workers"] = Plain(stage, nets, loader)
        for name, fast in (("ours, the paper's estimator", False), ("ours, the fast estimator", True)):
            if stage != "pretrain" or not fast:
                label = "ours" if stage == "pretrain" else name
                learner = learner_of(stage, arguments.depth, arguments.kept, device, fast=fast)
                runs[label] = Ours(learner, here, arguments.batch_size)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(arguments.rounds + 1):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number:  # the first one warms up
                    rates[name].append(arguments.images / (time.perf_counter() - begun))
        best_plain = max(statistics.median(r) for name, r in rates.items() if name.startswith("plain"))
        for name, found in rates.items():
            middle = statistics.median(found)
            rows.append(
                {
                    "stage": stage, "loop": name, "images_per_second": round(middle, 1),
                    "least": round(min(found), 1), "most": round(max(found), 1),
                    "times_the_best_plain": round(middle / best_plain, 2),
                }
            )  # fmt: skip
            print(
                f"{stage:<11} {name:<28} {middle:8.0f} images/s ({min(found):.0f} to {max(found):.0f}), "
                f"{middle / best_plain:.2f} times the best plain loop",
                flush=True,
            )
    return rows


def decoding(folder: Path, *, rounds: int, images: int, size: int = 224) -> list[dict[str, Any]]:
    """One row: images per second that one process reads, decodes and crops, as training asks for them.

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
        begun = time.perf_counter()
        for seed in range(images):
            reader[seed % len(paths), seed, True]
        if round_number:  # the first one warms up
            rates.append(images / (time.perf_counter() - begun))
    middle = statistics.median(rates)
    print(f"decoding: {middle:.0f} images/s a process ({min(rates):.0f} to {max(rates):.0f})")
    return [{"stage": "decoding", "images_per_second": round(middle, 1), "rounds": rounds}]


@mendable()
def main() -> None:
    """Measure, print, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--kept", type=float, default=0.6, help="share of the blocks that policies keep")
    parser.add_argument("--images", type=int, default=2560, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the DataLoader")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--decode", type=Path, metavar="FOLDER", help="measure this instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = choose_device()
    if arguments.decode is not None:
        rows = decoding(arguments.decode, rounds=arguments.rounds, images=arguments.images)
    else:
        rows = measure(arguments, device)
    if arguments.out is not None:
        content = {
            "machine": describe_machine(device), "rows": rows,
            "command": "python -m tools.throughput " + " ".join(Path(a).name for a in sys.argv[1:]),
        }  # fmt: skip
        write_text(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
