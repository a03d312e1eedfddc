"""Who is timed: BlockDrop's executors, the full ResNet in every form, other ResNets with every block.

Shapes: B images of a batch of H by W pixels, N classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmark.full_resnet_forms import full_resnet_forms
from pipeline.benchmark.timing import reason
from pipeline.device import computes_in_bf16
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Executor, Networks, UnavailableError
from pipeline.inference.masked import Masked
from pipeline.models.build import make_resnet
from pipeline.models.policy_net import average_down
from pipeline.results import Kind

ALL_BLOCKS = ", all blocks"  # in the name of an executor that runs the full ResNet

Run = Callable[[Tensor], Any]  # takes images [B, H, W, 3] uint8
Make = Callable[[], Run]
LeaveOut = Callable[[str, str], None]  # takes what is left out, and why


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    batch_sizes: Sequence[int]
    precisions: Sequence[str]
    # names of pipeline.inference.auto.EXECUTORS; those that can't run here are left out
    executors: Sequence[str]
    keep_ratios: Sequence[float]  # of synthetic policies
    distinct_policies: int  # how many distinct ones the variant `few` has
    # depths of full ResNets that are timed beside (with random weights: time only)
    sole_depths: Sequence[int]
    rounds: int  # the most; fewer, but at least MIN_ROUNDS, when the time is up
    seconds: float  # for everything but what engines compile
    with_compile: bool  # torch.compile among the full-ResNet forms; it takes minutes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Who is measured."""

    name: str
    kind: Kind
    precision: str
    run: Run

    @property
    def label(self) -> str:
        """Name and precision, which no two candidates share."""
        return f"{self.name} {self.precision}"

    @property
    def label_with_all_blocks(self) -> str:
        return f"{self.name}{ALL_BLOCKS} {self.precision}"


def fastest_first(
    candidates: Mapping[str, Candidate],
    seconds: Mapping[str, float],
    kind: Kind,
    precision: str | None = None,
) -> list[str]:
    """Labels of a kind (and a precision) by rising seconds; candidates without seconds are left out."""
    labels = [
        label
        for label in seconds
        if candidates[label].kind == kind and precision in (None, candidates[label].precision)
    ]
    return sorted(labels, key=lambda label: seconds[label])


@dataclass(frozen=True, kw_only=True)
class CandidateMaker:
    """Makes every candidate that can run here, and leaves out the others by name and reason."""

    networks: Networks  # BlockDrop's ResNet and policy network
    full: Networks  # the ResNet that is best with every block
    settings: Settings
    leave_out: LeaveOut

    def make_all(self) -> list[Candidate]:
        """All candidates of all precisions, but for a precision that the device only emulates."""
        candidates: list[Candidate] = []
        for precision in self.settings.precisions:
            if precision == "bf16" and not computes_in_bf16(self.networks.device):
                self.leave_out(
                    "bf16", "this device has no instructions for it and would only emulate it"
                )
                continue
            missing: set[str] = set()  # executors; with all blocks they are not there either
            for kind, makers in self._makers(precision).items():
                for name, make in makers.items():
                    if name.removesuffix(ALL_BLOCKS) in missing:
                        continue
                    try:
                        run = make()
                    except Exception as error:
                        missing.add(name)
                        why = str(error) if isinstance(error, UnavailableError) else reason(error)
                        self.leave_out(f"{name} {precision}", why)
                    else:
                        candidates.append(Candidate(name=name, kind=kind, precision=precision, run=run))
        return candidates

    def _makers(self, precision: str) -> Mapping[Kind, Mapping[str, Make]]:
        """What makes the candidates of a precision, by kind and name."""
        executors: dict[str, Make] = {
            name: partial(make_executor, self.networks, name=name, precision=precision)
            for name in self.settings.executors
        }
        forms: dict[str, Make] = dict(
            full_resnet_forms(self.full, precision, with_compile=self.settings.with_compile)
        )
        for name in self.settings.executors:
            if name != Masked.name:  # with every block it is the eager form
                forms[f"{name}{ALL_BLOCKS}"] = partial(
                    make_executor, self.full, name=name, precision=precision
                )
        soles: dict[str, Make] = {
            f"ResNet-{depth}": partial(self._sole, depth, precision)
            for depth in self.settings.sole_depths
        }
        if (resnet := self.networks.resnet).is_pruned:
            pruned = replace(self.networks, policy_net=None)
            soles[f"pruned ResNet-{resnet.depth}"] = partial(make_executor, pruned, precision=precision)
        return {"blockdrop": executors, "full": forms, "sole": soles}

    def _sole(self, depth: int, precision: str) -> Executor:
        """A full ResNet of another depth with random weights, by the device's best executor."""
        full = self.full.resnet
        sole = make_resnet(
            family=full.family, depth=depth, width=full.width, num_classes=full.num_classes
        )
        networks = replace(self.full, resnet=sole.to(self.networks.device))
        return make_executor(networks, precision=precision)


def policy_network_alone(networks: Networks, precision: str, *, image_size: int, most: int) -> Run:
    """The policy network with its normalisation, by the best executor here, on up to `most` images."""
    policy_net, normalisation = networks.policy_net, networks.normalisation
    assert policy_net is not None
    alone = Networks(resnet=policy_net.features, policy_net=None, normalisation=normalisation)
    execute = make_executor(alone, precision=precision)
    size = policy_net.input_size
    if size is None or size == image_size:
        return execute
    every_block = torch.ones(most, alone.num_blocks, dtype=torch.bool, device=networks.device)

    def run(images: Tensor) -> Tensor:
        inputs = average_down(normalisation(images), size)
        return execute.classify(inputs, every_block[: len(images)])

    return run
