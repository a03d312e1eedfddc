"""Networks of either family by name: what params.yaml and a checkpoint say of one."""

from pipeline.architectures import Family
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet


def make_resnet(*, family: Family, depth: int, width: int, num_classes: int) -> ResNet:
    """A ResNet of either family with fresh weights.

    Raises:
        ValueError: the family has no such depth.
    """
    if family == "cifar":
        return cifar_resnet(depth=depth, width=width, num_classes=num_classes)
    # here, since torchvision takes as long to import as PyTorch, and CIFAR's networks need none of it
    from pipeline.models.resnet_imagenet import imagenet_resnet

    return imagenet_resnet(depth=depth, width=width, num_classes=num_classes)
