"""Dynamic inference: the choice of an executor, and predictions for a whole split.

Shapes: B images of a batch, M images of a split, K blocks, N classes, H and W pixels.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.executors.base import Executor, Networks, Output, UnavailableError
from pipeline.executors.gather import Gather
from pipeline.executors.graphed import Graphed
from pipeline.executors.grouped import Grouped
from pipeline.executors.masked import Masked
from pipeline.executors.native import Native
from pipeline.executors.persistent import Persistent
from pipeline.policy_net import PolicyNet, average_down
from pipeline.resnet import ResNet
from pipeline.tensors import Images, Normalisation
from pipeline.timing import seconds_of

R = TypeVar("R")

EXECUTORS: dict[str, type[Executor]] = {
    kind.name: kind for kind in (Masked, Gather, Grouped, Graphed, Native, Persistent)
}
EVALUATION_BATCH = 500  # bounds memory; results do not depend on it
EVALUATION_PIXELS = 500 * 96**2  # of a batch: larger images come in smaller ones
# Which executor has won, by networks' shapes, precision, image size and batch. Only the process forgets
# it, and a training's resume point keeps it: another executor rounds otherwise, so another choice would
# make another training.
CHOICES: dict[str, str] = {}
IMAGES_PER_POLICY = 16  # from which on images of one policy are run together, apart from the others


class Auto(Executor):
    """The fastest executor for the device, the precision and each batch's policies.

    On CPUs `native`; without it `grouped` when the images of a batch share few policies, `gather` when
    they do not. On CUDA `graphed` and, where it proves itself, `persistent` race for each power of two
    of images, on the first such batch of networks of these shapes (`CHOICES`), and not again when a
    curriculum has learnt to drop more.
    """

    name = "auto"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        on_cuda = self.device.type == "cuda"
        self.contestants: list[Executor] = []
        self.without = ""
        if on_cuda:
            self.contestants.append(Graphed(networks, precision=precision))
        kind = Persistent if on_cuda else Native
        try:
            self.contestants.append(kind(networks, precision=precision))
        except UnavailableError as error:
            self.without = f" (no {kind.name}: {error})"
        if not self.contestants:
            self.gather = Gather(networks, precision=precision)
            self.grouped = Grouped(networks, precision=precision)

    @property
    def description(self) -> str:
        """Which executors it comes down to here, and why not a faster one."""
        names = [executor.name for executor in self.contestants] or [Grouped.name, Gather.name]
        return " or ".join(names) + self.without

    def free(self) -> None:
        """That of all executors that it may come down to."""
        for executor in self.contestants:
            executor.free()

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        if self.contestants:
            sides = images.shape[1:3]
            return self._fastest(len(images), sides, lambda executor: executor._run(images, actions))
        return super()._run(images, actions)

    def _decide(self, inputs: Tensor) -> Tensor:
        return self.gather._decide(inputs)

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        if self.contestants:
            sides = inputs.shape[2:]
            return self._fastest(
                len(inputs), sides, lambda executor: executor._classify(inputs, actions)
            )
        distinct = len(torch.unique(actions, dim=0))
        executor = self.grouped if len(actions) >= IMAGES_PER_POLICY * distinct else self.gather
        return executor._classify(inputs, actions)

    def _run_under(self, images: Tensor, policies: Tensor) -> Tensor:
        if len(self.contestants) == 1:
            return self.contestants[0]._run_under(images, policies)
        return super()._run_under(images, policies)  # the race is for each

    def _classify_under(self, inputs: Tensor, policies: Tensor) -> Tensor:
        if len(self.contestants) == 1:
            return self.contestants[0]._classify_under(inputs, policies)
        return super()._classify_under(inputs, policies)

    def _fastest(self, batch: int, sides: Sequence[int], run: Callable[[Executor], R]) -> R:
        """Run it by the executor that has won, or now wins, at batches of this size."""
        if len(self.contestants) == 1:
            return run(self.contestants[0])
        those = {executor.name: executor for executor in self.contestants}
        what = f"{self.networks.shapes}, {self.precision}, {sides[0]} x {sides[1]} pixels"
        key = f"{what}, under {1 << batch.bit_length()} images"
        if CHOICES.get(key) not in those:
            if key in CHOICES:
                warnings.warn(f"{CHOICES[key]} can't run now, so others race for {key}", stacklevel=2)
            CHOICES[key] = min(those, key=lambda name: self._seconds(partial(run, those[name])))
        return run(those[CHOICES[key]])

    def _seconds(self, call: Callable[[], object]) -> float:
        try:
            call()  # compiles, captures, warms up
        except torch.OutOfMemoryError:
            return math.inf
        return min(seconds_of(call, self.device) for _ in range(3))


def make_executor(networks: Networks, *, name: str = "auto", precision: str = "fp32") -> Executor:
    """Pack the networks' weights for `name`: auto, masked, gather, grouped, graphed, native or
    persistent.

    Raises:
        ValueError: no executor has that name.
        UnavailableError: it can't run here; `auto` always can.
    """
    kinds: dict[str, type[Executor]] = {Auto.name: Auto, **EXECUTORS}
    if name not in kinds:
        raise ValueError(f"no executor {name!r}; choose one of {', '.join(kinds)}")
    return kinds[name](networks, precision=precision)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Per image, on the CPU.

    Attributes:
        classes: [M] int64, the predicted class.
        losses: [M] float32, cross-entropy in nats.
        correct: [M] bool.
    """

    classes: Tensor
    losses: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.correct.double().mean())


def predict(
    resnet: ResNet,
    split: Images,
    actions: Tensor | None = None,
    *,
    normalisation: Normalisation,
    precision: str = "fp32",
) -> Predictions:
    """Classify a split in evaluation mode under actions [M, K] (None: every block runs)."""
    networks = Networks(resnet=resnet, policy_net=None, normalisation=normalisation)
    execute = make_executor(networks, precision=precision)
    logits = torch.cat(
        [
            execute(images, None if actions is None else actions[part]).logits
            for part, images in _in_parts(split)
        ]
    )
    losses = F.cross_entropy(logits, split.labels, reduction="none")
    classes = logits.argmax(dim=1)
    correct = classes == split.labels
    return Predictions(classes=classes.cpu(), losses=losses.cpu(), correct=correct.cpu())


def right_under(
    resnet: ResNet, split: Images, policies: Tensor, *, normalisation: Normalisation
) -> Tensor:
    """Whether each image of a split is classified rightly under each of V policies [V, M, K].

    Returns:
        [V, M] bool, on the CPU.
    """
    execute = make_executor(Networks(resnet=resnet, policy_net=None, normalisation=normalisation))
    parts = []
    for part, images in _in_parts(split):
        logits = execute(images, policies[:, part]).logits
        parts.append((logits.argmax(dim=2) == split.labels[part]).cpu())
    return torch.cat(parts, dim=1)


def accuracies_of(right: Tensor) -> list[float]:
    """The share of each row of [V, M] bool that is right."""
    return [float(row.double().mean()) for row in right]


@torch.no_grad()
def predict_policy(
    policy_net: PolicyNet, split: Images, *, normalisation: Normalisation, precision: str = "fp32"
) -> Tensor:
    """Logits [M, K] of the keep probabilities, on the CPU."""
    # what decides is a ResNet too, all of whose blocks run
    networks = Networks(resnet=policy_net.features, policy_net=None, normalisation=normalisation)
    execute = make_executor(networks, precision=precision)
    logits = []
    for _, images in _in_parts(split):
        inputs = average_down(normalisation(images), policy_net.input_size)
        every = torch.ones(len(inputs), networks.num_blocks, dtype=torch.bool, device=inputs.device)
        logits.append(execute.classify(inputs, every))
    return torch.cat(logits).cpu()


def evaluation_batch(image_size: int) -> int:
    """How many images of that side are evaluated at a time."""
    return max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // image_size**2))


def _in_parts(split: Images) -> Iterator[tuple[slice, Tensor]]:
    """All images a batch at a time, each batch with its place."""
    size = evaluation_batch(split.image_size)
    starts = range(0, len(split), size)
    return zip((slice(s, s + size) for s in starts), split.in_order(size), strict=True)
