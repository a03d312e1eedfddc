"""The images that every candidate gets in each round.

Shapes: B images of a batch, M test images, K blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmark.candidates import Run
from pipeline.benchmark.full_resnet_forms import WholeGraph
from pipeline.benchmark.timing import Call, random_policies
from pipeline.inference.auto import LARGE
from pipeline.inference.base import Executor

IMAGES_A_ROUND = 32  # at least: smaller batches are repeated with other images
LARGE_IMAGES_A_ROUND = 8  # of LARGE pixels or more a side, one of which takes a tenth of a second


def repeats_of(batch: int, image_size: int) -> int:
    """How many batches make a round."""
    return -(-(IMAGES_A_ROUND if image_size < LARGE else LARGE_IMAGES_A_ROUND) // batch)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The images of every round, in one batch or, if it is small, in several: images differ in cost."""

    batches: list[list[Tensor]]  # [rounds][repeats], each [B, H, W, 3] uint8
    rows: Tensor  # [rounds, repeats, B], which test images they are

    @classmethod
    def of(cls, images: Tensor, *, batch: int, count: int) -> "Rounds":
        """Other images [M, H, W, 3] in each of `count` rounds, around and around the test set."""
        repeats = repeats_of(batch, images.shape[1])
        rows = torch.arange(count * batch * repeats) % len(images)
        rows = rows.view(count, -1, batch)  # [rounds, repeats, B]
        batches = [[images[r.to(images.device)] for r in repeats] for repeats in rows]
        return cls(batches=batches, rows=rows)

    @property
    def repeats(self) -> int:
        """How many batches a round has."""
        return len(self.batches[0])

    def on(self, run: Run) -> Call:
        """Run it on all batches of the round."""

        def call(number: int) -> None:
            for images in self.batches[number]:
                run(images)

        return call

    def policies(
        self, num_blocks: int, *, num_kept: int, distinct: int | None, draw: torch.Generator
    ) -> list[list[Tensor]]:
        """Random policies [B, K] for every batch."""
        make = partial(random_policies, num_kept=num_kept, distinct=distinct, draw=draw)
        return [
            [make(len(images), num_blocks).to(images.device) for images in batches]
            for batches in self.batches
        ]

    def forced(self, execute: Callable[..., Any], policy: Run, policies: list[list[Tensor]]) -> Call:
        """Run the policy network, then an executor's ResNet under other actions than it chose.

        So the images are normalised twice; the real executor does it once and is that much faster.
        """

        def call(number: int) -> None:
            for images, actions in zip(self.batches[number], policies[number], strict=True):
                policy(images)
                execute(images, actions)

        return call


def peak_mib(run: Run, call: Call, device: torch.device) -> float:
    """MiB that a first call takes, with the scratch and the graphs that later ones reuse."""
    torch.cuda.synchronize(device)
    if isinstance(run, Executor | WholeGraph):
        run.free()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
