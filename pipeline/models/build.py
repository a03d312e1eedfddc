"""Networks of either family by name: what params.yaml and a checkpoint say of one."""

from pipeline.architectures import Family, stage_sizes
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_imagenet import ImageNetResNet


def make_resnet(*, family: Family, depth: int, width: int, num_classes: int) -> ResNet:
    """A ResNet of either family with fresh weights.

    Raises:
        ValueError: the family has no such depth.
    """
    stage_sizes(family, depth)
    kind = ResNet if family == "cifar" else ImageNetResNet
    return kind(depth=depth, width=width, num_classes=num_classes)
