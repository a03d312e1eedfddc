"""From a checkpoint and images to predictions: class, confidence, blocks kept, FLOPs.

Shapes: B images, K blocks, N classes, H and W pixels.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.flops import measure
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.inference.predict import evaluation_batch
from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import truncate
from pipeline.models.checkpoint import Checkpoint, CheckpointError

MAX_GAMMA = 1e9


class PredictionError(UserError):
    """Images can't be classified by this checkpoint; the message says why and names the remedy."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The networks' prediction for one image, and its cost."""

    name: str  # the likeliest class
    probabilities: NDArray[np.float64]  # [N] float64, in the order of the checkpoint's classes
    kept_blocks: NDArray[np.bool_]  # [K] bool, the blocks that ran
    flops: float  # of this image, 2 per multiply-add, the policy network included
    # fraction of the full ResNet's FLOPs; negative where the policy network costs more than it saves
    flops_saved: float

    @property
    def confidence(self) -> float:
        return float(self.probabilities.max())

    @property
    def blocks(self) -> int:
        return int(self.kept_blocks.sum())

    @property
    def pattern(self) -> str:
        """The blocks as text: `#` for each that ran, `.` for each that was skipped."""
        return "".join("#" if kept else "." for kept in self.kept_blocks)

    def __str__(self) -> str:
        return (
            f"{self.name} {100 * self.confidence:.1f} %, {self.pattern} {self.blocks} of "
            f"{len(self.kept_blocks)} blocks, {100 * self.flops_saved:.1f} % of the FLOPs saved"
        )

    def record(self) -> dict[str, Any]:
        """Plain values under the names that JSON lines and the served model have."""
        return {
            "class": self.name,
            "confidence": self.confidence,
            "probabilities": self.probabilities.tolist(),
            "kept_blocks": self.kept_blocks.tolist(),
            "blocks": self.blocks,
            "flops": self.flops,
            "flops_saved": self.flops_saved,
        }


class Predictor:
    """Classifies images with a ResNet and its policy network, or with every block of a ResNet alone.

    Threads may share it: a lock lets one call run at a time, because executors reuse memory.

    Args:
        checkpoint: with a ResNet; its networks are moved to `device`.
        image_size: side in pixels, for a checkpoint that does not hold it.
        device: where to run; None: where the weights are.

    Raises:
        CheckpointError: it holds no ResNet.
        PredictionError: the image size is not known, or differs from the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        image_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        resnet, policy_net = checkpoint.resnet, checkpoint.policy_net
        if resnet is None:
            raise CheckpointError(
                f"{checkpoint.path} holds no ResNet, which classifies; take models/finetune (both "
                "networks) or models/pretrain, or copy a checkpoint that holds one"
            )
        self.classes = checkpoint.classes
        self.image_size = image_size_of(checkpoint, image_size)
        self.cost = measure(resnet, policy_net, self.image_size)
        for network in (resnet, policy_net):
            if network is not None and device is not None:
                network.to(device)
        self._execute = make_executor(
            Networks(resnet=resnet, policy_net=policy_net, normalisation=checkpoint.normalisation)
        )
        self._lock = threading.Lock()
        self._policy_net, self._usual_images = policy_net, checkpoint.usual_images
        if self._usual_images is not None:
            self._usual_images.to(self._execute.device)  # where the networks are, moved here or before
        self._normalisation = checkpoint.normalisation
        self._values = None if policy_net is None else policy_net.path_values
        self._trained_gamma = 0.0 if self._values is None else float(self._values.gamma)

    @property
    def num_blocks(self) -> int:
        return len(self.cost.blocks)

    def __call__(
        self, images: NDArray[np.uint8] | Tensor, *, gamma: float | None = None
    ) -> list[Prediction]:
        """A prediction for each image of [B, H, W, 3] uint8; B may be 0 or whatever fits in memory.

        Args:
            gamma: from `gamma_of`; None: that of the training.

        Raises:
            PredictionError: they have another size or type.
        """
        batches = self._checked(images).split(evaluation_batch(self.image_size))
        return [prediction for batch in batches for prediction in self._predict(batch, gamma)]

    def unlike_training(self, images: NDArray[np.uint8] | Tensor) -> NDArray[np.bool_] | None:
        """Whether each image [B, H, W, 3] is unlike those of the training: its class says little then.

        One in a hundred of those like them is called so too. It takes the policy network's time again.

        Returns:
            [B] bool; None: the checkpoint does not say what is usual.

        Raises:
            PredictionError: they have another size or type.
        """
        batches = self._checked(images).split(evaluation_batch(self.image_size))
        if self._policy_net is None or self._usual_images is None:
            return None
        with self._lock:
            unlike = [
                self._usual_images.are_unlike(self._policy_net, self._normalisation(part)).cpu()
                for part in batches
            ]
        return np.asarray(torch.cat(unlike))

    def gamma_of(self, *, gamma: float | None = None, budget: float | None = None) -> float | None:
        """The gamma under which a policy between paths is to decide; None: that of its training.

        Args:
            gamma: penalty of a wrong prediction.
            budget: in place of gamma, the mean FLOPs of an image as a fraction of the full ResNet's.

        Raises:
            PredictionError: the policy decides block by block, both are given, or there is no such
                gamma or budget.
        """
        if gamma is None and budget is None:
            return None
        if self._values is None:
            raise PredictionError(
                "this model decides block by block, for the gamma that it was trained with; leave gamma "
                "and budget out, or take a model whose policy_net.paths are set"
            )
        if budget is not None:
            if gamma is not None:
                raise PredictionError(f"gamma {gamma:g} and budget {budget:g}: give one of the two")
            try:
                gamma = self._values.gamma_of(budget * self.cost.full)
            except ValueError:
                low, high = (self._values.dial[1, [0, -1]] / self.cost.full).tolist()
                raise PredictionError(
                    f"budget {budget:g} is out of this model's reach; it takes {low:.3f} to {high:.3f} "
                    "of the full ResNet's FLOPs"
                ) from None
        if gamma is None or not 0 <= gamma <= MAX_GAMMA:
            raise PredictionError(f"gamma {gamma} is no number from 0 to {MAX_GAMMA:g}")
        return gamma

    def _checked(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        side = self.image_size
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
        if dtype != "uint8" or len(shape) != 4 or shape[1:] != (side, side, 3):
            raise PredictionError(
                f"images are {dtype} {shape}, expected uint8 [B, {side}, {side}, 3], colours 0 to "
                f"255; {_remedy(dtype, shape, side)}"
            )
        if isinstance(images, Tensor):
            return images.to(self._execute.device)
        # torch warns of arrays that can't be written to
        writable = np.require(images, requirements=["C", "W"])
        return torch.from_numpy(writable).to(self._execute.device)

    def _predict(self, images: Tensor, gamma: float | None) -> list[Prediction]:
        with self._lock:
            if self._values is not None:
                self._values.gamma.fill_(self._trained_gamma if gamma is None else gamma)
            output = self._execute(images)
            # copies, because an executor may reuse the memory of its outputs
            logits = output.logits.double().cpu()  # [B, N]
            actions = output.actions.bool().cpu().clone()  # [B, K]
        if not logits.isfinite().all():
            raise PredictionError(
                "the network's logits are NaN or infinite, so there is no class; its training diverged "
                "or its weights are damaged: train it again, or take another model"
            )
        probabilities = logits.softmax(dim=1).numpy()
        flops = self.cost.of(actions).tolist()
        return [
            Prediction(
                name=self.classes[int(row.argmax())],
                probabilities=row,
                kept_blocks=kept,
                flops=cost,
                flops_saved=1 - cost / self.cost.full,
            )
            for row, kept, cost in zip(probabilities, actions.numpy(), flops, strict=True)
        ]


def as_colours(images: NDArray[Any]) -> NDArray[np.uint8]:
    """The same numbers as uint8, a type that JSON lacks; nothing is rounded, clipped or converted.

    Integers 0 to 255 are accepted, and floats that are whole (255.0). An image of floats whose largest
    is 1.0 is refused: it may be a black and white one in 0 to 1.

    Args:
        images: [B, ...]; of dtype object where they come from JSON, so that a bool or a text shows.

    Raises:
        PredictionError: there is no batch or no image, or a number is refused.
    """
    if images.ndim == 0:
        raise PredictionError(f"a single number is no batch of images; {_COLOURS}")
    if images.size == 0:
        raise PredictionError(f"there is no image in {images.shape}; send one at least")
    types = set(map(type, images.flat)) if images.dtype.kind == "O" else {images.dtype.type}
    if list in types:
        raise PredictionError("images differ in size, or their rows do; scale them to one size first")
    if others := [other for other in types if not _is_number(other)]:
        raise PredictionError(f"colours are of type {others[0].__name__}; {_COLOURS}")
    with np.errstate(invalid="ignore"):  # of NaN and infinity, which are refused
        wrong = ~((images >= 0) & (images <= 255) & (images % 1 == 0)).astype(bool)
    if wrong.any():
        raise PredictionError(f"a colour is {truncate(images[wrong][0])}; {_COLOURS}")
    if any(issubclass(number, float | np.floating) for number in types):
        largest = images.reshape(len(images), -1).max(axis=1)
        if (largest == 1).any():
            raise PredictionError(f"the largest colour of an image is 1.0; {_COLOURS}")
    return images.astype(np.uint8)


_COLOURS = (
    "they are whole numbers 0 to 255: multiply images in 0 to 1 by 255 and round them, and do not "
    "normalise them, the model does it"
)


def _is_number(value_type: type) -> bool:
    return value_type is not bool and issubclass(value_type, int | float | np.integer | np.floating)


def _remedy(dtype: str, shape: tuple[int, ...], side: int) -> str:
    """How to get uint8 images [B, S, S, 3] from the input."""
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        return "put the channels last: images.transpose(0, 2, 3, 1)"
    if len(shape) == 3 and shape[2] == 3:
        return "one image is a batch too: images[None]"
    if len(shape) == 4 and shape[3] == 4:
        return "leave out alpha: images[..., :3]"
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "grey images need their channel three times: images.reshape(B, S, S, 1).repeat(3, axis=3)"
    if len(shape) == 4 and shape[1:] == (side, side, 3):
        return f"{dtype} is not cast, since 0 to 1 would be black: give whole numbers 0 to 255 as uint8"
    return (
        f"scale them to {side} x {side} pixels first, as pipeline.sources.image_folder.read_image does"
    )


def image_size_of(checkpoint: Checkpoint, given: int | None = None) -> int:
    """Side in pixels of the images that a checkpoint takes; `given` is for one that does not hold it.

    Raises:
        PredictionError: it is not known, the two differ, or it is no multiple of 4 from 8 to 512.
    """
    trained = checkpoint.image_size
    if trained is not None and given not in (None, trained):
        raise PredictionError(
            f"{checkpoint.path} was trained on images of {trained} x {trained} pixels, not {given}; "
            "leave the size out"
        )
    size = trained or given
    if size is None:
        raise PredictionError(
            f"{checkpoint.path} is older and does not say for which image size it was trained; name it "
            "(data.image_size of its params.yaml, `--image-size` of tools.predict)"
        )
    if not 8 <= size <= 512 or size % 4:
        raise PredictionError(f"image size {size} is no multiple of 4 from 8 to 512; name one that is")
    return size
