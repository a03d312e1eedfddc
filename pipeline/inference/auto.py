"""Dynamic inference: the choice of an executor, and predictions for a whole split.

Shapes: B images of a batch, M images of a split, K blocks, N classes, H and W pixels.
"""

import errno
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.device import seconds_of
from pipeline.inference.base import Executor, Networks, Output
from pipeline.inference.cuda_graphs import CudaGraphs
from pipeline.inference.gather import Gather
from pipeline.inference.grouped import Grouped
from pipeline.inference.masked import Masked
from pipeline.inference.native import Native
from pipeline.inference.triton_kernel import TritonKernel
from pipeline.infra.errors import UserError, explain_memory
from pipeline.infra.safe_io import truncate

R = TypeVar("R")

EXECUTORS: dict[str, type[Executor]] = {
    kind.name: kind for kind in (Masked, Gather, Grouped, CudaGraphs, Native, TritonKernel)
}
# Which executor has won, by networks' shapes, precision, image size and batch. Only the process forgets
# it, and a training's resume point keeps it: another executor rounds otherwise, so another choice would
# make another training.
CHOICES: dict[str, str] = {}
IMAGES_PER_POLICY = 16  # from which on images of one policy are run together, apart from the others


class GatherOrGrouped(Gather, Grouped):
    """`grouped` when the images of a batch share few policies, `gather` when they do not."""

    name = "gather or grouped"

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        distinct = len(torch.unique(actions, dim=0))
        few = len(actions) >= IMAGES_PER_POLICY * distinct
        return (Grouped if few else Gather)._classify(self, inputs, actions)


class Auto(Executor):
    """The fastest executor for the device, the precision and each batch's policies.

    On CPUs `native`. On CUDA `cuda_graphs` and, where it proves itself, `triton` race for each power of
    two of images, on the first such batch of networks of these shapes (`CHOICES`), and not again when a
    curriculum has learnt to drop more. Where none of these can run, `gather` or `grouped`, and where
    they can't either, `masked`.

    An executor that can't be made, or that fails at what another one then does, is left out from there
    on, and a line says why.
    """

    name = "auto"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        fastest: list[type[Executor]] = (
            [CudaGraphs, TritonKernel] if self.device.type == "cuda" else [Native]
        )
        self.spare: list[type[Executor]] = [GatherOrGrouped, Masked]  # not made before they are needed
        self.left_out: dict[str, str] = {}
        self.contestants = self._made(fastest)
        while not self.contestants:
            self.contestants = self._made([self.spare.pop(0)])

    @property
    def description(self) -> str:
        """Which executors it comes down to here, and why not a faster one."""
        names = " or ".join(executor.name for executor in self.contestants)
        return names + "".join(f" (no {name}: {reason})" for name, reason in self.left_out.items())

    def free(self) -> None:
        """That of all executors that it may come down to."""
        for executor in self.contestants:
            executor.free()

    def _made(self, kinds: Sequence[type[Executor]]) -> list[Executor]:
        """Those of the kinds that can be made; `masked` must."""
        made: list[Executor] = []
        for kind in kinds:
            try:
                made.append(kind(self.networks, precision=self.precision))
            except Exception as error:
                if kind is Masked:
                    raise
                self._leave_out(kind.name, error)
        return made

    def _leave_out(self, name: str, error: Exception) -> None:
        """Go on without that executor, where the fault can be its own; raise the error where not."""
        if not _may_be_its_own(error):
            raise error
        self.left_out[name] = truncate((str(error).strip() or type(error).__name__).splitlines()[0])
        _say(f"inference goes on without the executor {name}: {self.left_out[name]}")

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        sides = images.shape[1:3]
        return self._by_the_best(len(images), sides, lambda executor: executor._run(images, actions))

    def _decide(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError("whoever runs the ResNet asks its own policy network")

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        return self._by_the_best(
            len(inputs), inputs.shape[2:], lambda executor: executor._classify(inputs, actions)
        )

    def _run_under(self, images: Tensor, policies: Tensor) -> Tensor:
        if len(self.contestants) > 1:
            return super()._run_under(images, policies)  # the race is for each
        return self._by_the_best(
            len(images), images.shape[1:3], lambda executor: executor._run_under(images, policies)
        )

    def _classify_under(self, inputs: Tensor, policies: Tensor) -> Tensor:
        if len(self.contestants) > 1:
            return super()._classify_under(inputs, policies)
        return self._by_the_best(
            len(inputs), inputs.shape[2:], lambda executor: executor._classify_under(inputs, policies)
        )

    def _by_the_best(self, batch: int, sides: Sequence[int], run: Callable[[Executor], R]) -> R:
        """Run it by the executor that has won, or now wins, at batches of this size.

        Where it fails the others are tried. If one of them can, those that failed are left out. If none
        can, what they were given is at fault, and nobody is left out.
        """
        failures: dict[Executor, Exception] = {}
        for executor in self._in_turn(self._key(batch, sides), run, failures):
            try:
                result = run(executor)
            except Exception as error:
                if not _may_be_its_own(error):
                    raise
                failures[executor] = error
            else:
                self._go_on_with(executor, failures)
                return result
        raise next(iter(failures.values()))

    def _key(self, batch: int, sides: Sequence[int]) -> str:
        """Under what CHOICES has the winner."""
        what = f"{self.networks.shapes}, {self.precision}, {sides[0]} x {sides[1]} pixels"
        return f"{what}, under {1 << batch.bit_length()} images"

    def _in_turn(
        self, key: str, run: Callable[[Executor], R], failures: dict[Executor, Exception]
    ) -> Iterator[Executor]:
        """The winner of that key, then the other contestants, then the spare executors."""
        names = [executor.name for executor in self.contestants]
        if len(names) > 1 and CHOICES.get(key) not in names:
            if key in CHOICES:
                warnings.warn(f"{CHOICES[key]} can't run now, so others race for {key}", stacklevel=2)
            self._race(key, run, failures)
        winner = CHOICES.get(key)
        able = [executor for executor in self.contestants if executor not in failures]
        yield from sorted(able, key=lambda executor: executor.name != winner)
        for kind in self.spare:
            yield from self._made([kind])

    def _race(self, key: str, run: Callable[[Executor], R], failures: dict[Executor, Exception]) -> None:
        """Choose the fastest contestant that does not fail, if there is one."""
        seconds = {e: self._seconds(partial(run, e), e, failures) for e in self.contestants}
        able = [executor for executor in self.contestants if executor not in failures]
        if able:
            CHOICES[key] = min(able, key=lambda executor: seconds[executor]).name

    def _go_on_with(self, executor: Executor, failures: dict[Executor, Exception]) -> None:
        """Leave out those that failed at what the executor could do."""
        for failed, error in failures.items():
            self._leave_out(failed.name, error)
        if failures:
            self.contestants = [one for one in self.contestants if one not in failures]
        if executor not in self.contestants:
            self.contestants.append(executor)
            self.spare = self.spare[self.spare.index(type(executor)) + 1 :]

    def _seconds(
        self, call: Callable[[], object], executor: Executor, failures: dict[Executor, Exception]
    ) -> float:
        try:
            call()  # compiles, captures, warms up
        except torch.OutOfMemoryError:
            return math.inf
        except Exception as error:
            if not _may_be_its_own(error):
                raise
            failures[executor] = error
            return math.inf
        return min(seconds_of(call, self.device) for _ in range(3))


def _may_be_its_own(error: Exception) -> bool:
    """Whether an executor may have failed by a fault of its own, not for want of memory or disk."""
    if isinstance(error, UserError):
        return False
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return not no_room and explain_memory(error) is None


@cache
def _say(line: str) -> None:
    """Print a warning, but the same one once alone: an executor is made for every validation."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


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
