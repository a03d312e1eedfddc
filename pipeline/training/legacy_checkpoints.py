"""Checkpoints of the authors (Tushar-N/blockdrop and its fork), of torchvision, and of PyTorch's
ImageNet example: pickles from untrusted sources.

They are read by `torch.load(weights_only=True)` alone, with `argparse.Namespace` as the one further type
that they may hold, so no code in a file can run.
"""

import pickle
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.architectures import CIFAR_STAGES, IMAGENET, IMAGENET_BASIC, IMAGENET_BOTTLENECK, Family
from pipeline.infra import safe_pickle
from pipeline.infra.safe_io import short_repr, truncate
from pipeline.models.checkpoint import (
    MAX_BYTES,
    CheckpointError,
    PolicyNetArchitecture,
    ResNetArchitecture,
    fill,
    other_content,
)
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet

Weights = Mapping[str, Tensor]
OF_RESNET = ("resnet", "state_dict", "model")  # the authors', PyTorch's example, torchvision's training
OF_POLICY = ("agent", "net")  # the authors' new and old name
_TAKEN = "take a whole file of the BlockDrop authors' networks or of torchvision's ResNets"
_LAYER = re.compile(r"^layer([1-4])\.(0|[1-9]\d{0,3})\.(.+)$")
_UNREADABLE = "it is cut short, damaged or no checkpoint of PyTorch; take the file anew from its authors"
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and torch.compile
POLICY_INPUT = 112  # pixels: the authors' policy network for ImageNet averages 224 down by 2


@dataclass(frozen=True, kw_only=True)
class LegacyCheckpoint:
    """What was in the file; None where it had none. The authors keep no input normalisation."""

    resnet: ResNet | None
    policy_net: PolicyNet | None

    def need_resnet(self, path: Path) -> ResNet:
        """The ResNet, or CheckpointError when the file has none."""
        if self.resnet is None:
            raise CheckpointError(
                f"{path} holds a policy and no ResNet (some files of the fork are called finetuned but "
                "lost it); import it for the stage curriculum, and its ResNet for pretrain; with "
                "finetune.epochs 0 the two are evaluated as they are"
            )
        return self.resnet

    def need_policy_net(self, path: Path) -> PolicyNet:
        """The policy network, or CheckpointError when the file has none."""
        if self.policy_net is None:
            raise CheckpointError(f"{path} holds a ResNet and no policy; import it for pretrain")
        return self.policy_net


def load(path: Path) -> LegacyCheckpoint:
    """Read one of the authors' files (a ResNet, a policy, or both), or a ResNet of torchvision's kind.

    Raises:
        CheckpointError: it is no such file, holds forbidden types, or its weights don't fit.
    """
    content = _open(path)
    if any(_unwrapped(name) == "conv1.weight" for name in content):  # the weights by themselves
        content = {"state_dict": content}
    of_resnet, of_policy = (_first(content, names) for names in (OF_RESNET, OF_POLICY))
    if of_resnet is None and of_policy is None:
        known = ", ".join((*OF_RESNET, *OF_POLICY))
        raise CheckpointError(
            f"{path} holds none of {known}; its keys are {short_repr(list(content))}; {_TAKEN}"
        )
    return LegacyCheckpoint(
        resnet=None if of_resnet is None else _resnet(_weights(content, of_resnet, path), path),
        policy_net=None if of_policy is None else _policy_net(_weights(content, of_policy, path), path),
    )


def _first(content: dict[str, object], names: tuple[str, ...]) -> str | None:
    """The first of these keys, preferably one with a table: `model` may be a network's name."""
    keys = [name for name in names if name in content]
    return next((key for key in keys if isinstance(content[key], Mapping)), next(iter(keys), None))


def _unwrapped(name: object) -> str:
    return _WRAPPERS.sub("", name) if isinstance(name, str) else ""


def _open(path: Path) -> dict[str, object]:
    try:
        if (other := other_content(path)) is not None:
            raise CheckpointError(f"{path} is {other}")
        if path.is_file() and tarfile.is_tarfile(path):
            what = "of PyTorch's first format (tar), which can't be read as plain weights"
            raise CheckpointError(f"{path} is {what}; {_TAKEN}")
        content = safe_pickle.load(path, MAX_BYTES)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            raise CheckpointError(f"{path} is refused: {_UNREADABLE}") from None
        if forbidden[1].startswith("__torch__."):
            raise CheckpointError(f"{path} is TorchScript, not plain weights; {_TAKEN}") from None
        raise CheckpointError(
            f"{path} is refused: it builds more than plain weights ({truncate(forbidden[1], 80)}), "
            "which may run code; take the file from its authors as weights alone (a state_dict), and "
            "never load it in another way"
        ) from None
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint") from None
    except Exception as error:  # torch.load raises what the bytes happen to break
        raise CheckpointError(f"{path}: {_UNREADABLE} ({truncate(repr(error))})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint; {_TAKEN}")
    return content


def _weights(content: dict[str, object], key: str, path: Path) -> Weights:
    """The table under a key, with the names of torchvision or of the authors' policy network."""
    table = content[key]
    if not isinstance(table, Mapping) or not table:
        raise CheckpointError(f"{path}: {key} is no table of weights; {_TAKEN}")
    if not all(isinstance(k, str) and _is_plain(v) for k, v in table.items()):
        raise CheckpointError(f"{path}: {key} holds more than named, plain tensors; {_TAKEN}")
    if sum(tensor.nbytes for tensor in table.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: {key} claims more weights than the file has bytes; {_TAKEN}")
    weights = {_as_torchvision(_unwrapped(name)): tensor for name, tensor in table.items()}
    if len(weights) < len(table):
        raise CheckpointError(f"{path}: {key} has a weight under two names; {_TAKEN}")
    return weights


def _as_torchvision(name: str) -> str:
    """The authors' `blocks.STAGE.BLOCK` and `ds.STAGE` (a stage's first shortcut), as torchvision's."""
    name = re.sub(r"^(features\.|)blocks\.([0-3])\.", lambda m: f"{m[1]}layer{int(m[2]) + 1}.", name)
    return re.sub(
        r"^(features\.|)ds\.([0-3])\.", lambda m: f"{m[1]}layer{int(m[2]) + 1}.0.downsample.", name
    )


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor in memory: not sparse, nested or without data."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _length(weights: Weights, name: str, path: Path) -> int:
    """Length of the first axis of a weight that decides on the architecture."""
    if name not in weights or weights[name].ndim == 0:
        raise CheckpointError(f"{path} lacks {name}, or it is a single number; {_TAKEN}")
    return weights[name].shape[0]


def _resnet(weights: Weights, path: Path) -> ResNet:
    shape, named = _trunk(weights, path)
    classes = _length(weights, "fc.weight", path)
    return _built(ResNetArchitecture, shape | {"num_classes": classes}, named, path)  # type: ignore[return-value]


def _policy_net(weights: Weights, path: Path) -> PolicyNet:
    """The policy without its value head (`vnet`), which the authors never trained."""
    of_features = {
        name.removeprefix("features."): tensor
        for name, tensor in weights.items()
        if name.startswith("features.") and not name.startswith("features.fc.")
    }
    needed = ("logit.weight", "logit.bias", "features.conv1.weight")
    num_blocks, *_ = (_length(weights, name, path) for name in needed)
    shape, named = _trunk(of_features, path)
    named |= {name.replace("logit", "fc"): weights[name] for name in ("logit.weight", "logit.bias")}
    shape |= {
        "num_blocks": num_blocks,
        "input_size": POLICY_INPUT if shape["family"] == "imagenet" else None,
    }
    named = {f"features.{name}": tensor for name, tensor in named.items()}
    return _built(PolicyNetArchitecture, shape, named, path)  # type: ignore[return-value]


def _trunk(weights: Weights, path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Family, depth and width of the ResNet that has these weights, and the weights under our names."""
    sizes = stages_of(weights)
    width = _length(weights, "conv1.weight", path)
    family: Family = "imagenet" if weights["conv1.weight"].shape[2:] == (7, 7) else "cifar"
    depth = _depth(family, sizes, bottlenecks="layer1.0.conv3.weight" in weights)
    if depth is None:
        raise CheckpointError(
            f"{path} has {list(sizes)} blocks in its stages, as no ResNet here has: CIFAR's (3x3 stem) "
            "have the same number in each of three, ImageNet's (7x7) are torchvision's ResNets "
            f"with {', '.join(map(str, sorted(IMAGENET)))} layers"
        )
    shape: dict[str, object] = {"family": family, "depth": depth, "width": width}
    named = from_torchvision(weights, sizes)
    means = [name for name in named if name.endswith("running_mean")]
    # batch counters, which files from before PyTorch 0.4.1 lack and no result uses
    counters = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    return shape, counters | named


def _depth(family: Family, sizes: tuple[int, ...], *, bottlenecks: bool) -> int | None:
    """Depth of the network with so many blocks in each of four stages; None: there is none."""
    if family == "cifar":
        equal = sizes == (sizes[0],) * CIFAR_STAGES + (0,)
        return 2 * CIFAR_STAGES * sizes[0] + 2 if sizes[0] and equal else None
    known = IMAGENET_BOTTLENECK if bottlenecks else IMAGENET_BASIC
    return next((depth for depth, stages in known.items() if stages == sizes), None)


def _built(
    architecture: type[ResNetArchitecture | PolicyNetArchitecture],
    shape: dict[str, object],
    named: dict[str, Tensor],
    path: Path,
) -> nn.Module:
    try:
        network = architecture.model_validate(shape)
    except ValidationError as error:  # a network outside of what a sidecar allows
        first = error.errors()[0]
        what = f"{first['loc'][0]} {short_repr(first['input'])}: {first['msg']}"
        raise CheckpointError(f"{path} has weights of a network of {what}; {_TAKEN}") from None
    return fill(network.build, named, path, _TAKEN)


def stages_of(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in each stage of a network whose weights have torchvision's names."""
    indices = [(int(m[1]), int(m[2])) for m in map(_LAYER.match, weights) if m]
    return tuple(1 + max((i for s, i in indices if s == stage), default=-1) for stage in range(1, 5))


def from_torchvision(weights: Mapping[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Torchvision's weights under the names that `imagenet_resnet` has for them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _LAYER.match(name)
        if match:
            stage, index, rest = int(match[1]), int(match[2]), match[3]
            name = f"blocks.{sum(sizes[: stage - 1]) + index}.{rest.replace('downsample', 'shortcut')}"
        renamed[name] = tensor
    return renamed
