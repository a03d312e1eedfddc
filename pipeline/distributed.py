"""One network trained by several processes, as one process would train it, but for float noise.

`fit` draws everything random as tables with a row for each image; a process takes its part of the rows
of each batch. What a step means is thereby the same for every number of processes:

- gradients are those of the mean over the whole batch: a process weights its own mean by its fraction
  of the rows, then gradients are summed (`all_reduce_gradients`);
- batch norm, while it trains, normalises by the statistics of all rows (`SyncedBatchNorm`);
- a block that trains runs in all processes or in none, on no rows where need be, so that none waits
  for another in batch norm (`any_rank_ran`); one that no image runs is left as it is, weight decay
  included (`all_reduce_gradients`);
- metrics are summed, so every process knows them (`all_reduce_sum`).

Why not `DistributedDataParallel`: it averages over processes, which weigh unevenly here, wraps the
forward pass of one module, of which a step makes several in two, and must search for blocks that did not
run. What it would hide behind the backward pass is one message of the size of the weights: 7 MB for a
ResNet-110.
Why not `nn.SyncBatchNorm`: it has no form for CPUs. `SyncedBatchNorm` is the same on every device, so
that the tests, which have no GPU, see what trains on one.

Flags and counts that decide what runs are reduced on the CPU by gloo, so that no step waits for the
device.
Without other processes every function is the identity.
Shapes: R rows of this process, W processes, C channels, H and W pixels, P parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from pipeline.infra.ranks import RankInfo, rank_info

T = TypeVar("T")


def current_rank() -> RankInfo:
    """Which process of the process group this is; the only one where there is no group."""
    return rank_info() if distributed.is_initialized() else RankInfo()


def shard_rows(rows: Tensor) -> Tensor:
    """The part of a batch's rows that is for this process, [R]; parts differ by one row at most."""
    info = current_rank()
    return rows if info.size == 1 else torch.tensor_split(rows, info.size)[info.rank]


def all_reduce_max(numbers: Sequence[int]) -> list[int]:
    """The maximum of each number over all processes, which wait for each other for it."""
    if current_rank().size == 1:
        return list(numbers)
    maxima = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
    return maxima.tolist()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, for all processes; it is called there alone."""
    info = current_rank()
    if info.size == 1:
        return make()
    values: list[Any] = [make() if info.rank == 0 else None]
    distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def all_reduce_sum(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of one device, each summed over all processes."""
    if current_rank().size == 1 or not sums:
        return sums
    stacked = torch.stack([value.float() for value in sums.values()])  # one message
    distributed.all_reduce(stacked)
    return dict(zip(sums, stacked.unbind(), strict=True))


def all_reduce_mean(rows: Tensor, weight: float) -> Tensor:
    """Mean over the rows of all processes, [R, K] to [K]; without gradients.

    Args:
        weight: R over the rows of all processes.
    """
    mean = rows.detach().sum(dim=0) * (weight / max(1, len(rows)))  # this process's part of it
    if current_rank().size > 1:
        distributed.all_reduce(mean)
    return mean


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients.

    A parameter without a gradient in any process stays without one, so that the optimiser skips it, as
    in one process. One without a gradient in this process alone takes part with zeros.
    """
    if current_rank().size == 1:
        return
    parameters = list(parameters)
    has_gradient = all_reduce_max([int(p.grad is not None) for p in parameters])  # in any process
    trained = [p for p, has in zip(parameters, has_gradient, strict=True) if has]
    if not trained:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])  # one message
    distributed.all_reduce(flat)
    pieces = flat.split([p.numel() for p in trained])
    for parameter, gradient, piece in zip(trained, gradients, pieces, strict=True):
        parameter.grad = gradient.copy_(piece.view(gradient.shape))


def any_rank_ran(ran: Sequence[bool]) -> list[bool]:
    """Whether each block is run by an image of any process."""
    return [bool(maximum) for maximum in all_reduce_max([int(block_ran) for block_ran in ran])]


def broadcast_modules(modules: Iterable[nn.Module]) -> None:
    """Give all processes the weights and buffers of process 0, and batch norm over all of them."""
    if current_rank().size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, src=0)
        synchronise(module)


def synchronise(module: nn.Module) -> None:
    """Turn its batch norms into `SyncedBatchNorm`, in place: an optimiser keeps its parameters."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm which in training takes mean and variance over the rows of all processes.

    All of them must call it equally often, with or without rows. A single value of each channel in all
    processes together is normalised by the running statistics, as `resnet.BatchNorm` does.
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

    Ioffe and Szegedy 2015; the variances of the processes are combined as in Chan, Golub and LeVeque
    1979, which loses no digits where a mean is large. For a single value the running statistics are
    taken, by `where` and not by a branch, for which a step would wait.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        # this process's mean, sum of squared differences from it, and number of values: [2C + 1]
        local = weight.new_zeros(2 * channels + 1)
        if x.numel():
            variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)  # [C] each
            count = x.numel() // channels
            local = torch.cat([mean, variance * count, mean.new_full((1,), count)])
        gathered = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, local)
        # combine: [W, C], [W, C] and [W, 1] to [C] each
        means, squares, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        variance = (squares + counts * (means - mean).square()).sum(dim=0) / count
        # one value has no variance
        running_mean, running_var = running
        mean = torch.where(count > 1, mean, running_mean)
        variance = torch.where(count > 1, variance, running_var)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        out = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        scale = (variance + ctx.eps).rsqrt()  # [C]
        normalised = (x.float() - mean.view(shape)) * scale.view(shape)  # [R, C, H, W]
        grad = grads[0].float()
        # this process's part of the weights' gradients, which `all_reduce_gradients` sums later
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * normalised).sum(dim=(0, 2, 3))
        # x also moves the mean and the variance of all processes; running statistics it does not move
        sums = torch.stack([grad_bias, grad_weight])  # [2, C]
        distributed.all_reduce(sums)
        of_mean, of_variance = (sums / count * (count > 1)).view(2, *shape).unbind()
        grad_x = (grad - of_mean - normalised * of_variance) * (weight * scale).view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None
