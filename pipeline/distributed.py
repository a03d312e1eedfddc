"""One network trained by several processes, as one process would train it, but for float noise.

`fit` draws everything random as tables with a row for each image; a process takes its share of the rows
of each batch. What a step means is thereby the same for every number of processes:

- gradients are those of the mean over the whole batch: a process weighs its own mean by its share of the
  rows, then gradients are added up (`add_gradients`);
- batch norm, while it trains, normalises by the statistics of all rows (`SyncedBatchNorm`);
- a block that trains runs in all processes or in none, on no rows where need be, so that none waits
  for another in batch norm (`ran_anywhere`); one that no image runs is left as it is, weight decay
  included (`add_gradients`);
- metrics are added up, so every process knows them (`add_up`).

Why not `DistributedDataParallel`: it averages over processes, which weigh unevenly here, wraps the
forward pass of one module, of which a step makes several in two, and must search for blocks that did not
run. What it would hide behind the backward pass is one message of the size of the weights: 7 MB for a
ResNet-110.
Why not `nn.SyncBatchNorm`: it has no form for CPUs. `SyncedBatchNorm` is the same on every device, so
that the tests, which have no GPU, see what trains on one.

Numbers that steer (flags, counts) are added up on the CPU by gloo, so that no step waits for the device.
Without other processes every function is the identity.
Shapes: R rows of this process, W processes, C channels, H and W pixels, P parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from pipeline.infra.processes import RankInfo, rank_info

T = TypeVar("T")


def here() -> RankInfo:
    """Which of the processes that know each other this is; the only one where none do."""
    return rank_info() if distributed.is_initialized() else RankInfo()


def shard_rows(rows: Tensor) -> Tensor:
    """The share of a batch's rows that is this process's: as even as can be, maybe none."""
    own = here()
    return rows if own.size == 1 else torch.tensor_split(rows, own.size)[own.rank]


def all_reduce_max(numbers: Sequence[int]) -> list[int]:
    """Of each number the largest that any process has. All processes wait for each other here."""
    if here().size == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, for all; it is called there alone."""
    own = here()
    if own.size == 1:
        return make()
    found: list[Any] = [make() if own.rank == 0 else None]
    distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def all_reduce_sum(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of one device, each the sum of those of all processes."""
    if here().size == 1 or not sums:
        return sums
    together = torch.stack([value.float() for value in sums.values()])
    distributed.all_reduce(together)
    return dict(zip(sums, together.unbind(), strict=True))


def all_reduce_mean(rows: Tensor, share: float) -> Tensor:
    """Mean over the rows of all processes, [R, K] to [K]; without gradients.

    Args:
        share: of this process in the rows of all.
    """
    own = rows.detach().sum(dim=0) * (share / max(1, len(rows)))
    if here().size > 1:
        distributed.all_reduce(own)
    return own


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients.

    A parameter that has a gradient nowhere stays without one, so that the optimiser passes it by, as in
    one process; one that has none here has zeros.
    """
    if here().size == 1:
        return
    every = list(parameters)
    learnt = all_reduce_max([int(p.grad is not None) for p in every])
    moved = [p for p, somewhere in zip(every, learnt, strict=True) if somewhere]
    if not moved:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])  # one message
    distributed.all_reduce(flat)
    pieces = flat.split([p.numel() for p in moved])
    for parameter, gradient, piece in zip(moved, gradients, pieces, strict=True):
        parameter.grad = gradient.copy_(piece.view(gradient.shape))


def any_rank_ran(ran: Sequence[bool]) -> list[bool]:
    """Of each block whether an image of any process runs it."""
    return [bool(somewhere) for somewhere in all_reduce_max([int(one) for one in ran])]


def broadcast_modules(modules: Iterable[nn.Module]) -> None:
    """Give all processes the weights and buffers of process 0, and batch norm that knows of all."""
    if here().size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, src=0)
        synchronise(module)


def synchronise(module: nn.Module) -> None:
    """Make batch norm in it `SyncedBatchNorm`, in place: optimisers keep the parameters they hold."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm which in training takes mean and variance over the rows of all processes.

    All of them must come by here equally often, with or without rows. A single value of each channel in
    all processes together is normalised by the running statistics, as `resnet.BatchNorm` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[R, C, H, W], R from 0 on, to the same."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None  # ours all track them, with a momentum
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        running = self.running_mean.clone(), self.running_var.clone()
        out, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, *running)
        with torch.no_grad():
            self.num_batches_tracked.add_(count > 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp_min(1)), self.momentum)
        return out


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over rows and pixels of all processes.

    Ioffe and Szegedy 2015; the variances of parts are put together as in Chan, Golub and LeVeque 1979,
    which loses no digits where a mean is large. With one value alone they are the running ones, without
    a branch, for which a step would wait.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        own = weight.new_zeros(2 * channels + 1)  # mean, sum of squared differences from it, values
        if x.numel():
            variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
            count = x.numel() // channels
            own = torch.cat([mean, variance * count, mean.new_full((1,), count)])
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, own)
        means, squares, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        variance = (squares + counts * (means - mean).square()).sum(dim=0) / count
        mean, variance = (
            torch.where(count > 1, of_batch, kept)
            for of_batch, kept in zip((mean, variance), running, strict=True)
        )
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        out = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        scale = (variance + ctx.eps).rsqrt()
        normalised = (x.float() - mean.view(shape)) * scale.view(shape)
        grad = grads[0].float()
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * normalised).sum(dim=(0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight])  # of this process; `add_gradients` adds these up
        distributed.all_reduce(sums)
        of_mean, of_variance = (sums / count * (count > 1)).view(2, *shape).unbind()
        grad_x = (grad - of_mean - normalised * of_variance) * (weight * scale).view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None
