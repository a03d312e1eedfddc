"""The authors' checkpoints (Tushar-N/blockdrop and its fork), and torchvision's: pickles of unknown
hands.

They open only under `torch.load(weights_only=True)`, with `argparse.Namespace` as the one further type
that may be in them, so no code in a file can run.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline import pickles
from pipeline.checkpoint import (
    MAX_BYTES,
    CheckpointError,
    PolicyNetArchitecture,
    ResNetArchitecture,
    fill,
)
from pipeline.families import IMAGENET_BASIC, IMAGENET_BOTTLENECK
from pipeline.policy_net import PolicyNet
from pipeline.resnet import STAGES, ResNet
from pipeline.untrusted import cut, shown

Weights = Mapping[str, Tensor]
_ANEW = "take the file anew from its authors"
MAX_BLOCK = 333  # index in a stage; a name alone must not make a network of depth 600,000


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
                "lost it); import it for the stage curriculum, and a ResNet for pretrain"
            )
        return self.resnet

    def need_policy_net(self, path: Path) -> PolicyNet:
        """The policy network, or CheckpointError when the file has none."""
        if self.policy_net is None:
            raise CheckpointError(f"{path} holds a ResNet and no policy; import it for pretrain")
        return self.policy_net


def load(path: Path) -> LegacyCheckpoint:
    """Read one of the authors' files: a ResNet, a policy, or both; or torchvision's, a ResNet.

    Raises:
        CheckpointError: it is no such file, holds forbidden types, or its weights don't fit.
    """
    content = _open(path)
    resnet = policy_net = None
    if "layer1.0.conv1.weight" in content:  # the weights themselves, as torchvision publishes them
        resnet = _torchvision(_weights({"it": content}, "it", path), path)
    if "state_dict" in content:
        resnet = _resnet(_weights(content, "state_dict", path), path)
    if "resnet" in content:
        resnet = _resnet(_weights(content, "resnet", path), path)
    key = next((name for name in ("agent", "net") if name in content), None)
    if key is not None:
        policy_net = _policy_net(_weights(content, key, path), path)
    if resnet is None and policy_net is None:
        raise CheckpointError(
            f"{path} holds none of state_dict, resnet, agent, net; its keys are {shown(list(content))}; "
            f"{_ANEW}"
        )
    return LegacyCheckpoint(resnet=resnet, policy_net=policy_net)


def _open(path: Path) -> dict[str, object]:
    try:
        content = pickles.load(path, MAX_BYTES)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({cut(named[1], 80)})" if named else ""
        raise CheckpointError(
            f"{path} is refused: it is damaged, or would run code or build objects beyond plain "
            f"weights{what}; take the file from its authors, and never load it in another way"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint") from None
    except Exception as error:  # torch.load raises what the damaged bytes happen to break
        raise CheckpointError(
            f"{path} is no readable checkpoint ({cut(repr(error))}); {_ANEW}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint; {_ANEW}")
    return content


def _weights(content: dict[str, object], key: str, path: Path) -> Weights:
    found = content[key]
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path}: {key} is no table of weights; {_ANEW}")
    if not all(isinstance(k, str) and _is_plain(v) for k, v in found.items()):
        raise CheckpointError(f"{path}: {key} holds more than named, plain tensors; {_ANEW}")
    if sum(tensor.nbytes for tensor in found.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: {key} claims more weights than the file has bytes; {_ANEW}")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def _is_plain(value: object) -> bool:
    """Numbers in memory, one for each element: not sparse, nested or without data."""
    if not isinstance(value, Tensor):
        return False
    strided = value.layout == torch.strided and value.device.type == "cpu"
    return strided and not value.is_nested


def _flat(weights: Weights, path: Path) -> tuple[dict[str, Tensor], int]:
    """Names with one flat block index instead of (stage, block), and the depth that they make."""
    pattern = re.compile(r"^(?:layer(?P<from_1>\d+)|blocks\.(?P<from_0>\d+))\.(\d+)\.(.+)$")
    placed: list[tuple[int, int, str, Tensor]] = []
    flat: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = pattern.match(name)
        if match is None:
            flat[name] = tensor
            continue
        stage = int(match["from_0"]) if match["from_0"] else int(match["from_1"]) - 1
        placed.append((stage, int(match[3]), match[4], tensor))
    if any(stage < 0 or block > MAX_BLOCK for stage, block, *_ in placed):
        raise CheckpointError(f"{path} claims blocks that no ResNet here has; {_ANEW}")
    sizes = [1 + max((b for s, b, *_ in placed if s == stage), default=-1) for stage in range(3)]
    if len(set(sizes)) != 1 or not sizes[0] or any(s >= STAGES for s, *_ in placed):
        raise CheckpointError(
            f"{path} has {sizes} blocks in its first stages; a CIFAR ResNet has the same number in "
            f"each of three; {_ANEW}"
        )
    n = sizes[0]
    for stage, block, rest, tensor in placed:
        flat[f"blocks.{stage * n + block}.{rest}"] = tensor
    return flat, 2 * STAGES * n + 2


def _length(weights: Weights, name: str, path: Path) -> int:
    """Length of the first axis of a weight that decides on the architecture."""
    if name not in weights or weights[name].ndim == 0:
        raise CheckpointError(f"{path} lacks {name}, or it is a single number; {_ANEW}")
    return weights[name].shape[0]


def _complete(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the batch counters that files of before PyTorch 0.4.1 lack (no result depends on them)."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in weights
        if name.endswith("running_mean")
    }
    return counters | weights


def _resnet(weights: Weights, path: Path) -> ResNet:
    flat, depth = _flat(weights, path)
    width, classes = (_length(flat, name, path) for name in ("conv1.weight", "fc.weight"))
    try:
        network = ResNetArchitecture(depth=depth, width=width, num_classes=classes)
    except ValidationError as error:
        raise _beyond(error, path) from None
    return fill(network.build, _complete(flat), path, _ANEW)  # type: ignore[return-value]


def _torchvision(weights: Weights, path: Path) -> ResNet:
    """A ResNet for ImageNet whose weights have torchvision's names."""
    from pipeline.imagenet_resnet import from_torchvision, stages_of

    sizes = stages_of(weights)
    shallow, deep = IMAGENET_BASIC, IMAGENET_BOTTLENECK
    known = deep if "layer1.0.conv3.weight" in weights else shallow
    depth = next((depth for depth, stages in known.items() if stages == sizes), None)
    if depth is None:
        raise CheckpointError(
            f"{path} has {list(sizes)} blocks in its stages, as no ResNet here has; take one of "
            f"torchvision's ResNets with {', '.join(map(str, sorted(shallow | deep)))} layers"
        )
    width, classes = (_length(weights, name, path) for name in ("conv1.weight", "fc.weight"))
    try:
        network = ResNetArchitecture(family="imagenet", depth=depth, width=width, num_classes=classes)
    except ValidationError as error:
        raise _beyond(error, path) from None
    named = _complete(from_torchvision(weights, sizes))
    return fill(network.build, named, path, _ANEW)  # type: ignore[return-value]


def _policy_net(weights: Weights, path: Path) -> PolicyNet:
    """The policy without its value head (`vnet`), which the authors never trained."""
    trunk = {
        name.removeprefix("features."): tensor
        for name, tensor in weights.items()
        if name.startswith("features.") and not name.startswith("features.fc.")
    }
    flat, depth = _flat(trunk, path)
    num_blocks, _ = (_length(weights, name, path) for name in ("logit.weight", "logit.bias"))
    flat |= {name.replace("logit", "fc"): weights[name] for name in ("logit.weight", "logit.bias")}
    width = _length(weights, "features.conv1.weight", path)
    try:
        network = PolicyNetArchitecture(depth=depth, width=width, num_blocks=num_blocks, input_size=None)
    except ValidationError as error:
        raise _beyond(error, path) from None
    named = {f"features.{name}": tensor for name, tensor in _complete(flat).items()}
    return fill(network.build, named, path, _ANEW)  # type: ignore[return-value]


def _beyond(error: ValidationError, path: Path) -> CheckpointError:
    """The error for weights of a network that nobody can have meant."""
    first = error.errors()[0]
    what = f"{first['loc'][0]} {shown(first['input'])}: {first['msg']}"
    return CheckpointError(f"{path} has weights of a network of {what}; {_ANEW}")
