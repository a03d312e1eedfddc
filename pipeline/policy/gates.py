"""The ResNet with a gate on every block, whose gradient says how much the block matters to the loss.

A gate is 1, the fraction of the way from what comes out of a block's shortcut alone (0) to what comes
out of the block (1), for one image. It changes no result. Its gradient is <dL/dout, change> of its
image, where the change is the block's output less its shortcut's: the slope of the loss at that end of
the way where the image is.
Shapes: B images, K blocks, N classes, C channels, H and W pixels, R rows of a batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.resnet import Block, ResNet, eval_batch_norm, require_shape
from pipeline.models.row_ops import as_rows, kept_rows, put_rows, take_rows

Rows = Tensor | None  # indices [R]; None: every row of the batch


def forward_with_gates(
    resnet: ResNet, images: Tensor, actions: Tensor, *, try_dropped: bool
) -> tuple[Tensor, Tensor]:
    """Logits [B, N] as `resnet(images, actions)` gives them, and the gates [B, K].

    Args:
        try_dropped: give a gate its gradient also where the image drops the block. For that the block
            is run once more, forward alone and as it would be deployed. Else that gradient is 0.
    """
    require_shape(actions, (len(images), resnet.num_blocks))
    gates = torch.ones(actions.shape, device=images.device, requires_grad=True)  # [B, K]
    rows, skipped_rows = _kept_and_skipped(actions, try_dropped=try_dropped)
    runs = resnet.which_run(rows)
    x = resnet.stem(images)  # [B, C, H, W]
    for block, gate, block_rows, block_runs, block_skipped in zip(
        resnet.flat_blocks(), gates.unbind(1), rows, runs, skipped_rows, strict=True
    ):
        shortcut = block.shortcut(x)
        out = _run(block, x, shortcut, block_rows, gate) if block_runs else shortcut
        x = _try(block, x, shortcut, out, block_skipped, gate)
    return resnet.head(x), gates


def _kept_and_skipped(
    actions: Tensor, *, try_dropped: bool
) -> tuple[Sequence[Rows], Sequence[Tensor | None]]:
    """For every block the rows that keep it, and those on which to try it (None: on none)."""
    num_blocks = actions.shape[1]
    if not try_dropped:
        return kept_rows(actions), [None] * num_blocks
    kept = actions.bool()
    both = kept_rows(torch.cat([kept, ~kept], dim=1))  # both at once, for a single wait
    all_rows = torch.arange(len(actions), device=actions.device)
    return both[:num_blocks], [all_rows if rows is None else rows for rows in both[num_blocks:]]


def _run(block: Block, x: Tensor, shortcut: Tensor, rows: Rows, gate: Tensor) -> Tensor:
    """What `block(x, rows)` gives, [B, C, H, W], with the gradient of the gates [B] of these rows."""
    if rows is None:
        ran = F.relu(shortcut + block.residual(x), inplace=True)
        return GateGradient.apply(ran, shortcut, gate)
    taken = take_rows(x, rows)  # [R, C, H, W]
    shortcut_rows = taken if shortcut is x else take_rows(shortcut, rows)
    ran = F.relu(shortcut_rows + block.residual(taken), inplace=True)
    ran = GateGradient.apply(ran, shortcut_rows, gate.index_select(0, rows))
    return put_rows(shortcut, rows, ran)


def _try(
    block: Block, x: Tensor, shortcut: Tensor, out: Tensor, skipped_rows: Tensor | None, gate: Tensor
) -> Tensor:
    """`out`, the block's output for x, as it is, with the gradient of the gates of the skipped rows.

    The block is run on them by its running statistics, which it does not move. It learns nothing.
    """
    if skipped_rows is None or skipped_rows.numel() == 0:
        return out
    with torch.no_grad():
        taken = take_rows(x, skipped_rows)  # [R, C, H, W]
        shortcut_rows = taken if shortcut is x else take_rows(shortcut, skipped_rows)
        ran = F.relu(shortcut_rows + _eval_residual(block, taken), inplace=True)
        change = ran.sub_(shortcut_rows)  # [R, C, H, W]
    return CounterfactualGate.apply(out, skipped_rows, change, gate.index_select(0, skipped_rows))


def _eval_residual(block: Block, x: Tensor) -> Tensor:
    """`block.residual(x)` in evaluation mode, whatever mode the block is in."""
    *inner, (last_conv, last_bn) = block.convolutions()
    for conv, bn in inner:
        x = F.relu(eval_batch_norm(bn, conv(x)), inplace=True)
    return eval_batch_norm(last_bn, last_conv(x))


class GateGradient(torch.autograd.Function):
    """A block's output for the rows that run it, as it is; backward, the gradient of their gates too."""

    @staticmethod
    def forward(ctx: Any, ran: Tensor, shortcut: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(ran, shortcut)
        return ran.view_as(ran)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        ran, shortcut = ctx.saved_tensors
        (gradient,) = gradients
        # not the difference of two products, which bfloat16 would round away
        return gradient, None, _dot_per_image(gradient, ran - shortcut)


class CounterfactualGate(torch.autograd.Function):
    """x as it is; backward, the gradient of the gates of `rows`, had a block changed them by `change`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(rows, change)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows, change = ctx.saved_tensors
        (gradient,) = gradients
        return gradient, None, None, _dot_per_image(take_rows(gradient, rows), change)


def _dot_per_image(gradient: Tensor, change: Tensor) -> Tensor:
    """<gradient, change> of each image, [R, C, H, W] twice to [R] float32."""
    return torch.linalg.vecdot(as_rows(gradient), as_rows(change)).float()
