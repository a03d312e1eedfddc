"""Networks of either family by name: what params.yaml and a checkpoint say of one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.architectures import Family, InnerChannels
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet

M = TypeVar("M", bound=nn.Module)


def make_resnet(
    *,
    family: Family,
    depth: int,
    width: int,
    num_classes: int,
    inner_channels: InnerChannels | None = None,
) -> ResNet:
    """A ResNet of either family with fresh weights.

    Args:
        inner_channels: of each block of a pruned network; None: it is not pruned.

    Raises:
        ValueError: the family has no such depth, or `inner_channels` are of another number of blocks.
    """
    sizes = {"depth": depth, "width": width, "num_classes": num_classes}
    if family == "cifar":
        return cifar_resnet(**sizes, inner_channels=inner_channels)
    # here, since torchvision takes as long to import as PyTorch, and CIFAR's networks need none of it
    from pipeline.models.resnet_imagenet import imagenet_resnet

    return imagenet_resnet(**sizes, inner_channels=inner_channels)


class _Uninitialised(TorchFunctionMode):
    """No weights are drawn: on `meta` that would import PyTorch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[[], M]) -> M:
    """What `build` makes, with shapes and without memory."""
    with torch.device("meta"), _Uninitialised():
        return build()
