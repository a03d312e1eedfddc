"""Which depths a family of ResNets has, and how their blocks are spread over the stages. No PyTorch.

`cifar` (He et al. 2016, section 4.2): depth 6n+2, three stages of n basic blocks. `imagenet` (the same,
table 1): four stages of basic blocks up to 34 layers, of bottleneck blocks from 50 on. Depth 50 is of
both, so a depth says nothing without its family.
"""

from typing import Literal

Family = Literal["cifar", "imagenet"]

CIFAR_STAGES = 3
# 10 is the BlockDrop authors' policy network; 14 and 26 are for small images and tests
IMAGENET_BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
IMAGENET_BOTTLENECK = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
IMAGENET = IMAGENET_BASIC | IMAGENET_BOTTLENECK

InnerChannels = tuple[tuple[int, ...], ...]  # of each block, between its convolutions
# pruned blocks keep multiples of it, since executors compute 4, 8 or 16 channels at a time
CHANNEL_UNIT = 8


def stage_sizes(family: Family, depth: int) -> tuple[int, ...]:
    """Blocks in each stage.

    Raises:
        ValueError: the family has no network of that depth; the message names the nearest.
    """
    if family == "imagenet":
        if depth not in IMAGENET:
            known = ", ".join(map(str, sorted(IMAGENET)))
            raise ValueError(f"depth {depth} is none of the family imagenet, which has {known}")
        return IMAGENET[depth]
    n, remainder = divmod(depth - 2, 2 * CIFAR_STAGES)
    if remainder or n < 1:
        below = 2 * CIFAR_STAGES * max(n, 1) + 2
        raise ValueError(f"depth {depth} is not 6n+2; the nearest are {below} and {below + 6}")
    return (n,) * CIFAR_STAGES


def num_blocks(family: Family, depth: int) -> int:
    """K of a network of that depth."""
    return sum(stage_sizes(family, depth))


def inner_channels(family: Family, depth: int, width: int) -> InnerChannels:
    """The inner channels of each block of a network that is not pruned: two numbers for a bottleneck."""
    inner_convs = 2 if family == "imagenet" and depth in IMAGENET_BOTTLENECK else 1
    return tuple(
        (width * 2**stage,) * inner_convs
        for stage, size in enumerate(stage_sizes(family, depth))
        for _ in range(size)
    )


def kept_channels(channels: int, ratio: float) -> int:
    """How many channels are left when `ratio` of them is pruned: the nearest multiple of CHANNEL_UNIT.

    It is at least CHANNEL_UNIT; where there are no more than that, none is pruned.
    """
    nearest = CHANNEL_UNIT * round((1 - ratio) * channels / CHANNEL_UNIT)
    return channels if ratio == 0 else min(channels, max(CHANNEL_UNIT, nearest))


def require_trainable(family: Family, depth: int, width: int) -> None:
    """See that no shortcut has from 2 to 7 input channels: the family imagenet's are 1x1, stride 2.

    On a CPU without AVX-512 oneDNN's backward pass of such a convolution writes past the end of its
    memory (2 to 6 channels) or gives wrong gradients (7).

    Raises:
        ValueError: one has; the message names the least width.
    """
    least = {"cifar": 1, "imagenet": 2 if depth in IMAGENET_BOTTLENECK else 8}[family]
    if width < least:
        raise ValueError(
            f"width {width} of depth {depth} of the family imagenet can't be trained on every CPU "
            f"(oneDNN, 1x1 convolutions of stride 2); set it to {least} or more"
        )
