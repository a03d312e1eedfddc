"""The choice of an executor.

Shapes: B images, K blocks, N classes, V policies.
"""

import errno
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.device import seconds_of
from pipeline.inference.answering import Answering
from pipeline.inference.base import Executor, Networks, Output, UnavailableError
from pipeline.inference.cuda_graphs import CudaGraphs
from pipeline.inference.gather import Gather
from pipeline.inference.grouped import Grouped
from pipeline.inference.masked import Masked
from pipeline.inference.native import Native
from pipeline.inference.onednn import OneDnn
from pipeline.inference.triton_kernel import TritonKernel
from pipeline.infra.errors import UserError, explain_memory
from pipeline.infra.safe_io import truncate

R = TypeVar("R")

EXECUTORS: dict[str, type[Executor]] = {
    kind.name: kind for kind in (Masked, Gather, Grouped, OneDnn, CudaGraphs, Native, TritonKernel)
}
# The fastest executor, by the networks' shapes, precision, image size and batch. A choice holds until
# the process ends, and a training's resume point keeps it: another executor rounds differently, so
# another choice would make another training.
CHOICES: dict[str, str] = {}
IMAGES_PER_POLICY = 16  # from so many images of one policy on, they run together, apart from the others
LARGE = 128  # pixels of a side: from here on one image alone keeps a thread's convolutions at full speed


class GatherOrGrouped(Gather, Grouped):
    """`grouped` when images are large or the images of a batch share few policies, else `gather`.

    For large images `onednn` takes the place of `grouped` where it can run. By measurement on 2 CPU
    cores (AVX2), for random policies that keep 75 % of the blocks: up to 96 pixels `gather` is faster,
    at 128 they are equal, at 224 `grouped` is. `research.speed --executors gather,grouped,onednn`
    compares them on a machine.
    """

    name = "gather or grouped"

    @cached_property
    def onednn(self) -> OneDnn | None:
        """Made for the first large images."""
        try:
            return OneDnn(self.networks, precision=self.precision)
        except UnavailableError as error:
            _warn_once(f"inference goes on without the executor {OneDnn.name}: {error}")
            return None

    def free(self) -> None:
        self.__dict__.pop("onednn", None)

    def _is_large(self, inputs: Tensor) -> bool:
        return self.device.type == "cpu" and inputs.shape[-1] >= LARGE

    def _decide(self, inputs: Tensor) -> Tensor:
        if self._is_large(inputs) and self.onednn is not None:
            return self.onednn._decide(inputs)
        return super()._decide(inputs)

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        if self._is_large(inputs):
            if self.onednn is not None:
                return self.onednn._classify(inputs, actions)
            return Grouped._classify(self, inputs, actions)
        few = len(actions) >= IMAGES_PER_POLICY * len(torch.unique(actions, dim=0))
        return (Grouped if few else Gather)._classify(self, inputs, actions)


class Auto(Executor):
    """The fastest executor for the device, the precision and each batch's policies.

    On CPUs that is `native`. On CUDA it times `cuda_graphs` and `triton` and takes the faster one.
    (`triton` takes part only if it agrees with a float64 computation on this device.) It times them on
    the first batch of each size, for networks of these shapes; sizes between two powers of two count as
    one. `CHOICES` keeps the result, even if a policy later learns to drop more blocks. If none of these
    can run, it takes `onednn`, `gather` or `grouped`, and if they can't either, `masked`.

    An executor that can't be built, or that fails at a batch that another one can run, is left out from
    then on, and a line says why.
    """

    name = "auto"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        self.shapes = networks.shapes  # once: at batch 1 a call may take less than a millisecond
        fastest: list[type[Executor]] = (
            [CudaGraphs, TritonKernel] if self.device.type == "cuda" else [Native]
        )
        self.fallbacks: list[type[Executor]] = [GatherOrGrouped, Masked]  # built when they are needed
        self.left_out: dict[str, str] = {}
        self.candidates = self._build(fastest)
        while not self.candidates:
            self.candidates = self._build([self.fallbacks.pop(0)])

    @property
    def description(self) -> str:
        """The executors that are used here, and why a faster one is not."""
        names = " or ".join(executor.name for executor in self.candidates)
        return names + "".join(f" (no {name}: {reason})" for name, reason in self.left_out.items())

    def free(self) -> None:
        for executor in self.candidates:
            executor.free()

    def _build(self, kinds: Sequence[type[Executor]]) -> list[Executor]:
        """Executors of those kinds that can be built. If `masked` can't, that is an error."""
        executors: list[Executor] = []
        for kind in kinds:
            try:
                executors.append(_build(kind, self.networks, self.precision))
            except Exception as error:
                if kind is Masked:
                    raise
                self._leave_out(kind.name, error)
        return executors

    def _leave_out(self, name: str, error: Exception) -> None:
        """Do without that executor if the error may be its own fault; else raise the error."""
        if not _may_be_its_own(error):
            raise error
        self.left_out[name] = truncate((str(error).strip() or type(error).__name__).splitlines()[0])
        _warn_once(f"inference goes on without the executor {name}: {self.left_out[name]}")

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        return self._by_fastest(images.shape[:3], lambda executor: executor._run(images, actions))

    def _decide(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError("the executor that runs the ResNet runs its own policy network")

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        shape = (len(inputs), *inputs.shape[2:])
        return self._by_fastest(shape, lambda executor: executor._classify(inputs, actions))

    def _run_under(self, images: Tensor, policies: Tensor) -> Tensor:
        if len(self.candidates) > 1:
            return super()._run_under(images, policies)  # a race for each policy
        return self._by_fastest(images.shape[:3], lambda executor: executor._run_under(images, policies))

    def _classify_under(self, inputs: Tensor, policies: Tensor) -> Tensor:
        if len(self.candidates) > 1:
            return super()._classify_under(inputs, policies)
        shape = (len(inputs), *inputs.shape[2:])
        return self._by_fastest(shape, lambda executor: executor._classify_under(inputs, policies))

    def _by_fastest(self, shape: Sequence[int], run: Callable[[Executor], R]) -> R:
        """Run a batch of shape B, H, W by the fastest executor at this size; the first batch decides.

        Where it fails, the others are tried in turn. If one of them succeeds, those that failed are left
        out. If none does, the input is at fault: its first error is raised and no executor is left out.
        """
        failures: dict[Executor, Exception] = {}
        for executor in self._in_turn(self._key(*shape), run, failures):
            try:
                result = run(executor)
            except Exception as error:
                if not _may_be_its_own(error):
                    raise
                failures[executor] = error
            else:
                self._keep(executor, failures)
                return result
        raise next(iter(failures.values()))

    def _key(self, batch: int, height: int, width: int) -> str:
        """The key of CHOICES; batches between two powers of two share one."""
        setting = f"{self.shapes}, {self.precision}, {height} x {width} pixels"
        return f"{setting}, under {1 << batch.bit_length()} images"

    def _in_turn(
        self, key: str, run: Callable[[Executor], R], failures: dict[Executor, Exception]
    ) -> Iterator[Executor]:
        """The winner for that key, then the other candidates, then fallbacks, built one at a time.

        The caller records in `failures` which of them failed.
        """
        names = [executor.name for executor in self.candidates]
        if len(names) > 1 and CHOICES.get(key) not in names:
            if key in CHOICES:
                warnings.warn(f"{CHOICES[key]} can't run now, so others race for {key}", stacklevel=2)
            self._race(key, run, failures)
        winner = CHOICES.get(key)
        able = [executor for executor in self.candidates if executor not in failures]
        yield from sorted(able, key=lambda executor: executor.name != winner)  # stable: the winner first
        for kind in self.fallbacks:
            yield from self._build([kind])

    def _race(self, key: str, run: Callable[[Executor], R], failures: dict[Executor, Exception]) -> None:
        """Choose the fastest candidate that does not fail, if there is one."""
        seconds = {e: self._seconds(partial(run, e), e, failures) for e in self.candidates}
        able = [executor for executor in self.candidates if executor not in failures]
        if able:
            CHOICES[key] = min(able, key=lambda executor: seconds[executor]).name

    def _seconds(
        self, call: Callable[[], object], executor: Executor, failures: dict[Executor, Exception]
    ) -> float:
        """The best time of three calls; infinite without enough memory or after a failure."""
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

    def _keep(self, executor: Executor, failures: dict[Executor, Exception]) -> None:
        """Leave out the executors that failed at a batch that this one ran."""
        for failed, error in failures.items():
            self._leave_out(failed.name, error)
        if failures:
            self.candidates = [e for e in self.candidates if e not in failures]
        if executor not in self.candidates:
            self.candidates.append(executor)
            names = [kind.name for kind in self.fallbacks]
            self.fallbacks = self.fallbacks[names.index(executor.name) + 1 :]


def _may_be_its_own(error: Exception) -> bool:
    """Whether an error may be the executor's fault, and not a lack of memory or disk space."""
    if isinstance(error, UserError):
        return False
    disk_is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return not disk_is_full and explain_memory(error) is None


@cache
def _warn_once(line: str) -> None:
    """Print a warning once in a process, as an executor is built for every validation."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def make_executor(networks: Networks, *, name: str = "auto", precision: str = "fp32") -> Executor:
    """Build the executor `name`: auto, masked, gather, grouped, onednn, cuda_graphs, native or
    triton.

    Raises:
        ValueError: no executor has that name.
        UnavailableError: it can't run here; `auto` always can.
    """
    kinds: dict[str, type[Executor]] = {Auto.name: Auto, **EXECUTORS}
    if name not in kinds:
        raise ValueError(f"no executor {name!r}; choose one of {', '.join(kinds)}")
    return _build(kinds[name], networks, precision)


def _build(kind: type[Executor], networks: Networks, precision: str) -> Executor:
    """An executor of that kind. Beside most a policy network that classifies runs in `Answering`."""
    make = partial(kind, precision=precision)
    classifies = networks.policy_net is not None and networks.policy_net.path_values is not None
    if classifies and kind not in (Auto, Native):
        return Answering(networks, make, precision=precision)
    return make(networks)
