"""Checkpoints: a folder with the weights (safetensors) and a readable JSON sidecar, loaded strictly."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import UserError
from pipeline.policy_net import PolicyNet
from pipeline.resnet import STAGES, ResNet, blocks_per_stage
from pipeline.tensors import Normalisation

WEIGHTS = "model.safetensors"
SIDECAR = "model.json"
FORMAT: Literal[1] = 1
MAX_BYTES = 2 << 30  # refuse to read more: the largest network here has under 1 GB of weights


class CheckpointError(UserError):
    """A checkpoint can't be used; the message names the file, what is wrong and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _depth_of_a_resnet(depth: int) -> int:
    blocks_per_stage(depth)
    return depth


Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=8, le=512, multiple_of=4)]  # what params.yaml allows
Depth = Annotated[int, Field(le=2000), AfterValidator(_depth_of_a_resnet)]


class ResNetArchitecture(_Strict):
    """What rebuilds the ResNet."""

    depth: Depth
    width: Annotated[int, Field(ge=1, le=4096)]
    num_classes: Annotated[int, Field(ge=2, le=100_000)]

    def build(self) -> ResNet:
        """A ResNet with fresh weights."""
        return ResNet(depth=self.depth, width=self.width, num_classes=self.num_classes)


class PolicyNetArchitecture(_Strict):
    """What rebuilds the policy network."""

    depth: Depth
    width: Annotated[int, Field(ge=1, le=4096)]
    input_size: Annotated[int, Field(ge=8)] | None
    num_blocks: Annotated[int, Field(ge=1)]

    def build(self) -> PolicyNet:
        """A policy network with fresh weights."""
        return PolicyNet(
            num_blocks=self.num_blocks,
            depth=self.depth,
            width=self.width,
            input_size=self.input_size,
        )


class NormalisationRecord(_Strict):
    """How images are normalised before the networks see them."""

    mean: Annotated[tuple[float, float, float], Field(strict=False)]
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class Sidecar(_Strict):
    """model.json. It holds no time and no path, so that equal trainings give equal files.

    `image_size` came later: files without it are read as well.
    """

    format: Literal[1]
    stage: str
    resnet: ResNetArchitecture | None
    policy_net: PolicyNetArchitecture | None
    normalisation: NormalisationRecord
    image_size: Side | None = None
    classes: Annotated[tuple[str, ...], Field(strict=False)]
    metrics: dict[str, float | None]
    weights_sha256: str

    @model_validator(mode="after")
    def _fit_together(self) -> "Sidecar":
        if self.resnet is not None and self.resnet.num_classes != len(self.classes):
            raise ValueError(
                f"resnet.num_classes is {self.resnet.num_classes}, classes has {len(self.classes)} names"
            )
        if self.resnet is not None and self.policy_net is not None:
            blocks = STAGES * blocks_per_stage(self.resnet.depth)
            if self.policy_net.num_blocks != blocks:
                raise ValueError(
                    f"policy_net.num_blocks is {self.policy_net.num_blocks}, the ResNet has {blocks}"
                )
        return self


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Networks with what is needed to use them; a network that is not in it is None.

    `path` is where it was read from, None for one that is still to be written. `image_size` is the side
    in pixels of the images that it was trained on, None where an older file does not say it.
    """

    stage: str
    path: Path | None = None
    resnet: ResNet | None
    policy_net: PolicyNet | None
    normalisation: Normalisation
    image_size: int | None
    classes: tuple[str, ...]
    metrics: Mapping[str, float | None]

    def need_resnet(self) -> ResNet:
        """The ResNet, or CheckpointError when there is none."""
        if self.resnet is None:
            raise CheckpointError(f"{self.path} holds no ResNet; import it for curriculum")
        return self.resnet

    def need_policy_net(self) -> PolicyNet:
        """The policy network, or CheckpointError when there is none."""
        if self.policy_net is None:
            raise CheckpointError(f"{self.path} holds no policy network; import it for pretrain")
        return self.policy_net


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write weights and sidecar; equal checkpoints give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for prefix in ("resnet", "policy_net"):
        network: nn.Module | None = getattr(checkpoint, prefix)
        if network is not None:
            for name, tensor in network.state_dict().items():
                tensors[f"{prefix}.{name}"] = tensor.detach().cpu().contiguous()
    weights = save_safetensors(tensors)
    resnet, policy_net = checkpoint.resnet, checkpoint.policy_net
    sidecar = Sidecar(
        format=FORMAT,
        stage=checkpoint.stage,
        resnet=None
        if resnet is None
        else ResNetArchitecture(depth=resnet.depth, width=resnet.width, num_classes=resnet.num_classes),
        policy_net=None
        if policy_net is None
        else PolicyNetArchitecture(
            depth=policy_net.features.depth,
            width=policy_net.features.width,
            input_size=policy_net.input_size,
            num_blocks=policy_net.num_blocks,
        ),
        normalisation=NormalisationRecord(
            mean=checkpoint.normalisation.mean, std=checkpoint.normalisation.std
        ),
        image_size=checkpoint.image_size,
        classes=checkpoint.classes,
        metrics=dict(checkpoint.metrics),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    text = json.dumps(sidecar.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    (folder / SIDECAR).write_text(text, encoding="utf-8")


_ANEW = "copy both files of the checkpoint anew, or rerun the stage that made them"


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, strictly.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the other.
    """
    sidecar = _read_sidecar(folder / SIDECAR)
    path = folder / WEIGHTS
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} is over {MAX_BYTES >> 30} GB, too large for its networks; {_ANEW}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); {_ANEW}") from None
    if hashlib.sha256(content).hexdigest() != sidecar.weights_sha256:
        raise CheckpointError(
            f"{path} is damaged or of another checkpoint: its SHA-256 is not the one in {SIDECAR}; "
            f"{_ANEW}"
        )
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file ({error}); {_ANEW}") from None
    known = tuple(f"{prefix}." for prefix in ("resnet", "policy_net") if getattr(sidecar, prefix))
    strays = sorted(name for name in tensors if not name.startswith(known))
    if strays:
        raise CheckpointError(
            f"{path} holds weights of no network of {SIDECAR}: {_some(strays)}; {_ANEW}"
        )
    networks: dict[str, nn.Module | None] = {}
    for prefix, architecture in (("resnet", sidecar.resnet), ("policy_net", sidecar.policy_net)):
        networks[prefix] = None
        if architecture is not None:
            own = {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{prefix}.")
            }
            # shapes first: a false sidecar must not take the memory
            with torch.device("meta"), _Uninitialised():
                require_fit(architecture.build(), own, path)
            networks[prefix] = fill(architecture.build(), own, path)
    record = sidecar.normalisation
    return Checkpoint(
        stage=sidecar.stage,
        path=folder,
        resnet=networks["resnet"],  # type: ignore[arg-type]
        policy_net=networks["policy_net"],  # type: ignore[arg-type]
        normalisation=Normalisation(mean=record.mean, std=record.std),
        image_size=sidecar.image_size,
        classes=sidecar.classes,
        metrics=sidecar.metrics,
    )


class _Uninitialised(TorchFunctionMode):
    """Networks are built without drawing weights, which on `meta` would import PyTorch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Load weights into a network.

    Raises:
        CheckpointError: they don't fit it.
    """
    require_fit(network, weights, path)
    network.load_state_dict(weights)
    return network


def require_fit(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """All of the network's weights, no others, of the right shapes and types, and finite.

    Raises:
        CheckpointError: anything else.
    """
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not hold the weights of its {type(network).__name__}: "
            f"missing {_some(missing)}, unknown {_some(unknown)}; {_ANEW}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {own[name].dtype} {tuple(own[name].shape)}; {_ANEW}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite numbers; {_ANEW}")


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_sidecar(path: Path) -> Sidecar:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror}); a checkpoint is a folder with "
            f"{WEIGHTS} and {SIDECAR}; copy both"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}); {_ANEW}") from None
    try:
        return Sidecar.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = "" if isinstance(first["input"], dict) else f"is {first['input']!r}: "
        raise CheckpointError(f"{path}: {where}: {value}{first['msg']}; {_ANEW}") from None
