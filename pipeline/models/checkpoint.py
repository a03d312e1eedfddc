"""Checkpoints: a folder with the weights (safetensors) and a readable JSON sidecar, loaded strictly."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import gt
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from pipeline.architectures import Family, inner_channels, num_blocks
from pipeline.data.transforms import Normalisation
from pipeline.infra.atomic_io import write_atomically, write_text
from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import open_regular, read_json, short_repr, truncate
from pipeline.models.build import make_resnet, on_meta
from pipeline.models.out_of_distribution import UsualImages
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet

WEIGHTS = "model.safetensors"
SIDECAR = "model.json"
FORMAT: Literal[1] = 1
Network = TypeVar("Network", bound=nn.Module)
MAX_BYTES = 2 << 30  # refuse to read more: the largest network of the families has under 1 GB of weights
MAX_SIDECAR = 16 << 20


class CheckpointError(UserError):
    """A checkpoint can't be used; the message names the file, what is wrong and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _in_utf8(name: str) -> str:
    name.encode()  # raises a ValueError for half a character, which JSON can hold and no report
    return name


# what params.yaml allows
Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(ge=1e-3, le=1e3)]
ClassName = Annotated[str, AfterValidator(_in_utf8)]
Side = Annotated[int, Field(ge=8, le=512, multiple_of=4)]
Depth = Annotated[int, Field(le=2000)]
BlockChannels = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...], Field(strict=False, max_length=2)
]
BlockPath = Annotated[str, Field(pattern=r"^[01]{1,1000}$")]


class _Architecture(_Strict):
    """What rebuilds a network. The family came later: files without it hold CIFAR's."""

    family: Family = "cifar"
    depth: Depth

    @field_validator("depth")
    @classmethod
    def _of_its_family(cls, depth: int, info: ValidationInfo) -> int:
        num_blocks(info.data.get("family", "cifar"), depth)
        return depth

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Networks are written as before there was another family, or another kind of policy network."""
        written: dict[str, Any] = handler(self)
        if self.family == "cifar":
            del written["family"]
        if "paths" in written and written["paths"] is None:  # nor policy networks that classify
            del written["paths"], written["num_classes"]
        if "inner_channels" in written and written["inner_channels"] is None:  # nor pruned ones
            del written["inner_channels"]
        return written


class ResNetArchitecture(_Architecture):
    """What rebuilds the ResNet."""

    width: Annotated[int, Field(ge=1, le=4096)]
    num_classes: Annotated[int, Field(ge=2, le=100_000)]
    # of each block of a pruned network; missing where it is not
    inner_channels: Annotated[tuple[BlockChannels, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _is_pruned_from_its_shape(self) -> "ResNetArchitecture":
        if self.inner_channels is None:
            return self
        unpruned = inner_channels(self.family, self.depth, self.width)
        if [len(block) for block in self.inner_channels] != [len(block) for block in unpruned]:
            raise ValueError(f"inner_channels are not {len(unpruned)} times {len(unpruned[0])} numbers")
        for number, (block, most) in enumerate(zip(self.inner_channels, unpruned, strict=True), 1):
            if any(map(gt, block, most)):
                raise ValueError(f"inner_channels of block {number} are {block}, more than {most}")
        return self

    def build(self) -> ResNet:
        """A ResNet with fresh weights."""
        return make_resnet(
            family=self.family,
            depth=self.depth,
            width=self.width,
            num_classes=self.num_classes,
            inner_channels=self.inner_channels,
        )


class PolicyNetArchitecture(_Architecture):
    """What rebuilds the policy network."""

    width: Annotated[int, Field(ge=1, le=4096)]
    input_size: Side | None
    num_blocks: Annotated[int, Field(ge=1, le=1000)]
    # of one that classifies, and decides by the values of paths; both are missing where it does not
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    paths: Annotated[tuple[BlockPath, ...], Field(strict=False, min_length=2, max_length=64)] | None = (
        None
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "PolicyNetArchitecture":
        if (self.paths is None) != (self.num_classes is None):
            raise ValueError("num_classes and paths come together")
        for path in self.paths or ():
            if len(path) != self.num_blocks:
                raise ValueError(f"path {path} is not of {self.num_blocks} blocks")
        return self

    def build(self) -> PolicyNet:
        """A policy network with fresh weights."""
        values = None
        if self.paths is not None and self.num_classes is not None:
            values = PathValues(self.paths, num_classes=self.num_classes)
        return PolicyNet(
            path_values=values,
            num_blocks=self.num_blocks,
            depth=self.depth,
            width=self.width,
            input_size=self.input_size,
            family=self.family,
        )


class NormalisationRecord(_Strict):
    """How images are normalised before the networks see them."""

    mean: Annotated[tuple[Mean, Mean, Mean], Field(strict=False)]
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)]


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
    classes: Annotated[tuple[ClassName, ...], Field(strict=False)]
    metrics: dict[str, float | None]
    weights_sha256: str

    @model_validator(mode="after")
    def _fit_together(self) -> "Sidecar":
        if self.resnet is not None and self.resnet.num_classes != len(self.classes):
            raise ValueError(
                f"resnet.num_classes is {self.resnet.num_classes}, classes has {len(self.classes)} names"
            )
        if self.resnet is not None and self.policy_net is not None:
            blocks = num_blocks(self.resnet.family, self.resnet.depth)
            if self.policy_net.num_blocks != blocks:
                raise ValueError(
                    f"policy_net.num_blocks is {self.policy_net.num_blocks}, the ResNet has {blocks}"
                )
        if self.policy_net is not None and self.policy_net.num_classes not in (None, len(self.classes)):
            raise ValueError(
                f"policy_net.num_classes is {self.policy_net.num_classes}, classes has "
                f"{len(self.classes)} names"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Networks with what is needed to use them; a network that is not in it is None.

    `path` is where it was read from, None for one that is still to be written. `image_size` is the side
    in pixels of the images that it was trained on, and `usual_images` tells ones unlike those; both are
    None where an older file does not say it.
    """

    stage: str
    path: Path | None = None
    resnet: ResNet | None
    policy_net: PolicyNet | None
    normalisation: Normalisation
    image_size: int | None
    classes: tuple[str, ...]
    metrics: Mapping[str, float | None]
    usual_images: UsualImages | None = None

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
    """Write weights and sidecar; equal checkpoints give equal bytes.

    The sidecar comes last and holds the digest of the weights, so a folder in which only one of the two
    is new is refused by `load`.
    """
    tensors: dict[str, Tensor] = {}
    for prefix in ("resnet", "policy_net", "usual_images"):
        network: nn.Module | None = getattr(checkpoint, prefix)
        if network is not None:
            for name, tensor in network.state_dict().items():
                tensors[f"{prefix}.{name}"] = tensor.detach().cpu().contiguous()
    weights = save_safetensors(tensors)
    resnet, policy_net = checkpoint.resnet, checkpoint.policy_net
    values = None if policy_net is None else policy_net.path_values
    sidecar = Sidecar(
        format=FORMAT,
        stage=checkpoint.stage,
        resnet=None
        if resnet is None
        else ResNetArchitecture(
            family=resnet.family,
            depth=resnet.depth,
            width=resnet.width,
            num_classes=resnet.num_classes,
            inner_channels=resnet.inner_channels if resnet.is_pruned else None,
        ),
        policy_net=None
        if policy_net is None
        else PolicyNetArchitecture(
            family=policy_net.features.family,
            depth=policy_net.features.depth,
            width=policy_net.features.width,
            input_size=policy_net.input_size,
            num_blocks=policy_net.num_blocks,
            num_classes=None if values is None else values.num_classes,
            paths=None if values is None else values.paths,
        ),
        normalisation=NormalisationRecord(
            mean=checkpoint.normalisation.mean, std=checkpoint.normalisation.std
        ),
        image_size=checkpoint.image_size,
        classes=checkpoint.classes,
        metrics=dict(checkpoint.metrics),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = json.dumps(sidecar.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    write_atomically(folder / WEIGHTS, weights)
    write_text(folder / SIDECAR, text)


_COPY_AGAIN = (
    "copy both files of the checkpoint again, or `make repro`, which repairs what its stages made"
)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, strictly.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the other.
    """
    sidecar = _read_sidecar(folder / SIDECAR)
    path = folder / WEIGHTS
    content = _read_weights(path, sidecar.weights_sha256)
    try:
        tensors = load_safetensors(content)
    except Exception as error:  # types and shapes that PyTorch lacks raise what they happen to break
        raise CheckpointError(
            f"{path} is no valid safetensors file ({truncate(error)}); {_COPY_AGAIN}"
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"resnet": {}, "policy_net": {}, "usual_images": {}}
    strays = []
    for name, tensor in tensors.items():
        part, _, weight = name.partition(".")
        if getattr(sidecar, "policy_net" if part == "usual_images" else part, None) and part in parts:
            parts[part][weight] = tensor
        else:
            strays.append(name)
    if strays:
        raise CheckpointError(
            f"{path} holds weights of no network of {SIDECAR}: {_first_three(sorted(strays))}; "
            f"{_COPY_AGAIN}"
        )
    resnet = policy_net = usual_images = None
    if sidecar.resnet is not None:
        resnet = fill(sidecar.resnet.build, parts["resnet"], path)
    if sidecar.policy_net is not None:
        policy_net = fill(sidecar.policy_net.build, parts["policy_net"], path)
    if policy_net is not None and parts["usual_images"]:
        usual_images = fill(partial(UsualImages, policy_net), parts["usual_images"], path)
    record = sidecar.normalisation
    return Checkpoint(
        stage=sidecar.stage,
        path=folder,
        resnet=resnet,
        policy_net=policy_net,
        normalisation=Normalisation(mean=record.mean, std=record.std),
        image_size=sidecar.image_size,
        classes=sidecar.classes,
        metrics=sidecar.metrics,
        usual_images=usual_images,
    )


def other_content(path: Path) -> str | None:
    """What a download left in the file's place, by its first bytes, and the remedy; None: neither."""
    with open_regular(path) as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file; run `git lfs pull` where it came from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return (
            "an HTML or XML page in place of the file, such as a login, a warning or an error; download "
            "it anew, by a browser if need be"
        )
    return None


def fill(
    build: Callable[[], Network], weights: Mapping[str, Tensor], path: Path, remedy: str = _COPY_AGAIN
) -> Network:
    """A network with these weights.

    Raises:
        CheckpointError: they don't fit it.
    """
    require_fit(on_meta(build), weights, path, remedy)  # without memory: what is claimed may be false
    network = build()
    network.load_state_dict(weights)
    return network


def require_fit(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path, remedy: str = _COPY_AGAIN
) -> None:
    """Check that these are all of the network's weights and no others, of its shapes and types, finite,
    no variance below 0.

    Raises:
        CheckpointError: anything else.
    """
    expected = network.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not hold the weights of its {type(network).__name__}: "
            f"missing {_first_three(missing)}, unknown {_first_three(unknown)}; {remedy}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {expected[name].dtype} {tuple(expected[name].shape)}; {remedy}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite numbers; {remedy}")
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(f"{path}: {name} holds variances below 0; {remedy}")


def _first_three(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(truncate(name, 80) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _read_weights(path: Path, sha256: str) -> bytes:
    """The file's content, read once its digest is the expected one: a false file takes no memory."""
    try:
        with open_regular(path, MAX_BYTES) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                file.seek(0)
                return file.read()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); {_COPY_AGAIN}") from None
    if (other := other_content(path)) is not None:
        raise CheckpointError(f"{path} is {other}")
    raise CheckpointError(
        f"{path} is damaged or of another checkpoint: its SHA-256 is not the one in {SIDECAR}; "
        f"{_COPY_AGAIN}"
    )


def _read_sidecar(path: Path) -> Sidecar:
    try:
        content = read_json(path, MAX_SIDECAR)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror}); a checkpoint is a folder with "
            f"{WEIGHTS} and {SIDECAR}; copy both"
        ) from None
    except ValueError as error:
        if (other := other_content(path)) is not None:
            raise CheckpointError(f"{path} is {other}") from None
        raise CheckpointError(f"{path} is no valid JSON ({truncate(error)}); {_COPY_AGAIN}") from None
    try:
        return Sidecar.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = truncate(".".join(str(part) for part in first["loc"]), 80)
        value = "" if isinstance(first["input"], dict) else f"is {short_repr(first['input'])}: "
        raise CheckpointError(
            f"{path}: {where}: {value}{truncate(first['msg'])}; {_COPY_AGAIN}"
        ) from None
