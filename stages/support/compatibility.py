"""Checkpoints that are taken instead of a training: do they fit params.yaml and the other stages?

Whatever does not fit is refused with the remedy: another network would train and be evaluated under
numbers that params.yaml does not state.
"""

from pathlib import Path

from pipeline.config import Params, PolicyNetParams, ResNetParams
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.training import legacy_checkpoints
from stages.support.recipes import normalisation_of


def require_same(path: Path, what: str, actual: object, expected: object, remedy: str) -> None:
    """Refuse a checkpoint in which something is not as the rest of the pipeline expects it.

    Raises:
        CheckpointError: `actual` is not `expected`.
    """
    if actual != expected:
        raise CheckpointError(f"{path}: its {what} is {actual}, expected {expected}; {remedy}")


def require_same_image_size(path: Path, imported: Checkpoint, params: Params) -> None:
    """Compare the side of the images with params.yaml's, where the checkpoint states it.

    The authors' files and our first ones do not.

    Raises:
        CheckpointError: they differ.
    """
    if imported.image_size is not None:
        require_same(
            path, "image size", imported.image_size, params.data.image_size,
            "set data.image_size in params.yaml to the checkpoint's",
        )  # fmt: skip


def require_same_policy_net(path: Path, policy_net: PolicyNet, params: Params) -> None:
    """Compare a policy network with the one that params.yaml describes.

    Raises:
        CheckpointError: they differ.
    """
    expected, features, image_size = params.policy_net, policy_net.features, params.data.image_size
    values = policy_net.path_values
    paths = () if values is None else tuple(path.count("1") for path in values.paths)
    require_same(
        path, "policy network's paths", paths, expected.paths,
        "set policy_net.paths in params.yaml to the checkpoint's",
    )  # fmt: skip
    require_same(
        path, "policy network's family, depth, width and input_size",
        (features.family, features.depth, features.width, policy_net.input_size or image_size),
        (expected.family, expected.depth, expected.width, expected.input_size or image_size),
        "set policy_net in params.yaml to the checkpoint's",
    )  # fmt: skip


def load_resnet(
    path: Path,
    params: Params,
    classes: tuple[str, ...],
    *,
    depth: int,
    network: ResNetParams | PolicyNetParams | None = None,
    pruned: bool = False,
) -> ResNet:
    """The ResNet of our own or the authors' checkpoint, if it is the one that params.yaml describes.

    Args:
        network: that says its family and width; None: params.resnet.
        pruned: whether it may be a pruned one.

    Raises:
        CheckpointError: it can't be read, is of another network, data set or depth, or is pruned.
    """
    expected = network or params.resnet
    if path.is_dir():
        imported = checkpoint.load(path)
        require_same(
            path, "input normalisation", imported.normalisation, normalisation_of(params),
            "set resnet.mean and resnet.std in params.yaml to the checkpoint's",
        )  # fmt: skip
        require_same(
            path, "list of classes", imported.classes, classes,
            "set data in params.yaml to its data set",
        )  # fmt: skip
        require_same_image_size(path, imported, params)
        resnet = imported.need_resnet()
    else:
        resnet = legacy_checkpoints.load(path).need_resnet(path)
    require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (expected.family, depth, expected.width, len(classes)),
        "set resnet, policy_net or sole.depths, and data, in params.yaml to the checkpoint's",
    )  # fmt: skip
    if resnet.is_pruned and not pruned:
        raise CheckpointError(
            f"{path} holds a pruned ResNet; import it for prune, and for pretrain the whole one"
        )
    return resnet


def require_same_channels(path: Path, resnet: ResNet, before: ResNet) -> None:
    """Compare the channels inside the blocks with those of models/prune.

    Raises:
        CheckpointError: they differ.
    """
    if resnet.inner_channels != before.inner_channels:
        raise CheckpointError(
            f"{path}: its blocks have {_channels(resnet)} inner channels, those of models/prune "
            f"{_channels(before)}; import for prune the ResNet that it was finetuned from"
        )


def _channels(resnet: ResNet) -> str:
    """How many are inside each block."""
    return ", ".join("x".join(map(str, block)) for block in resnet.inner_channels)
