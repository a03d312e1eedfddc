"""The rows of a batch that run a block: found for all blocks at once, taken out and put back.

Shapes: B images, K blocks, C channels, H and W pixels, R rows that keep a block.
"""

import torch
from torch import Tensor


def kept_rows(actions: Tensor) -> list[Tensor | None]:
    """For every block, the rows of the batch that keep it: [B, K] bool to K index tensors [R].

    None stands for "every row", so that nothing need be gathered. The whole policy is known before
    the ResNet starts, so one `nonzero` serves all blocks, with a single wait for the device.
    """
    batch, num_blocks = actions.shape
    # one (block, row) pair for each kept block, sorted by block, then by row; on the host, since
    # `nonzero` and `tolist` would each wait for the device again
    block_of, row_of = actions.bool().t().cpu().nonzero(as_tuple=True)
    counts = torch.bincount(block_of, minlength=num_blocks).tolist()  # K times R
    row_of = row_of.to(actions.device)
    return [None if len(rows) == batch > 0 else rows for rows in torch.split(row_of, counts)]


def as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H*W*C]: a view of a channels_last tensor, which row indexing keeps so."""
    return x.permute(0, 2, 3, 1).flatten(1)  # also of no rows


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    """[R, H*W*C] back to a channels_last [R, C, H, W], with C, H, W of `like`."""
    _, channels, height, width = like.shape
    return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for x [B, C, H, W], channels_last in and out (plain indexing would lose it)."""
    return _as_images(as_rows(x).index_select(0, rows), x)


def put_rows(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """A copy of x [B, C, H, W] in which `rows` are `new` [R, C, H, W]."""
    return _as_images(as_rows(x).index_copy(0, rows, as_rows(new)), x)
