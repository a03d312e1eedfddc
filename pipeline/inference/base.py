"""The interface of all executors.

Shapes: B images, K blocks, N classes, C channels, H and W pixels, V policies for each image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.data.transforms import Normalisation
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet


class UnavailableError(Exception):
    """The executor can't run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What an executor runs. Without a policy network every block runs, unless actions are given."""

    resnet: ResNet
    policy_net: PolicyNet | None
    normalisation: Normalisation

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.resnet.fc.weight.device

    @property
    def num_blocks(self) -> int:
        """K, the length of a policy."""
        return self.resnet.num_blocks

    @property
    def shapes(self) -> str:
        """A key of the architecture: equal exactly for networks that differ in their weights alone."""
        policy_net = self.policy_net
        parts = [self.resnet] if policy_net is None else [self.resnet, policy_net.features]
        labels = [
            f"{part.family} {part.depth} x {part.width} to {part.num_classes}"
            + (f", inside {part.inner_channels}" if part.is_pruned else "")
            for part in parts
        ]
        size = None if policy_net is None else policy_net.input_size
        return ", ".join(labels if size is None else [*labels, f"seen at {size} pixels"])


@dataclass(frozen=True, kw_only=True)
class Output:
    """The result for a batch, on the device of the images."""

    logits: Tensor  # [B, N] float32; [V, B, N] under V policies
    actions: Tensor  # [B, K] bool, the blocks that ran; [V, B, K] under V policies


class Executor(ABC):
    """Runs networks in evaluation mode: images in, logits and actions out.

    The weights are prepared once, when the executor is built; it does not see later changes of them.

    Args:
        networks: on one device.
        precision: `fp32` or `bf16`, of weights and activations.

    Raises:
        UnavailableError: it can't run these networks, at this precision or on this machine.
    """

    name: ClassVar[str]

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        self.networks = networks
        self.precision = precision
        self.device = networks.device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    @torch.no_grad()
    def __call__(self, images: Tensor, actions: Tensor | None = None) -> Output:
        """Classify images [B, H, W, 3] uint8 under actions [B, K] (None: the policy network's).

        Under V policies, actions [V, B, K], the result is that of V separate calls. An executor may run
        once what the policies of an image have in common.

        Raises:
            ValueError: images or actions have another shape or type.
        """
        if images.dim() != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 [B, H, W, 3]"
            )
        if actions is not None:
            actions = self._checked(actions, len(images))
        elif self.networks.policy_net is None:
            actions = images.new_ones((len(images), self.networks.num_blocks), dtype=torch.bool)
        if len(images) == 0:
            if actions is None:
                actions = torch.empty(0, self.networks.num_blocks, dtype=torch.bool, device=self.device)
            return Output(logits=self._empty_logits(actions), actions=actions)
        if actions is not None and actions.dim() == 3:
            return Output(logits=self._run_under(images, actions), actions=actions)
        return self._run(images, actions)

    @torch.no_grad()
    def classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Logits [B, N] float32 of normalised inputs [B, 3, H, W] under actions [B, K].

        Under V policies, actions [V, B, K], logits are [V, B, N].

        Raises:
            ValueError: actions have another shape.
        """
        actions = self._checked(actions, len(inputs))
        if len(inputs) == 0:
            return self._empty_logits(actions)
        if actions.dim() == 3:
            return self._classify_under(inputs, actions)
        return self._classify(inputs, actions)

    def free(self) -> None:  # noqa: B027 - most keep nothing
        """Free the scratch memory and graphs of past calls; the next call builds them again."""

    def _empty_logits(self, actions: Tensor) -> Tensor:
        return torch.empty(*actions.shape[:-1], self.networks.resnet.num_classes, device=self.device)

    def _checked(self, actions: Tensor, batch: int) -> Tensor:
        expected = (batch, self.networks.num_blocks)
        under_many = actions.dim() == 3 and len(actions) > 0
        if tuple(actions.shape[-2:]) != expected or not (under_many or actions.dim() == 2):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, expected {expected}, or "
                f"[V, {expected[0]}, {expected[1]}] for V policies"
            )
        return actions.to(device=self.device, dtype=torch.bool)

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        """Without actions the policy network decides; then there is one."""
        inputs = self.networks.normalisation(images).to(self.dtype)
        if actions is None:
            actions = self._decide(inputs)
        return Output(logits=self._classify(inputs, actions), actions=actions)

    @abstractmethod
    def _decide(self, inputs: Tensor) -> Tensor:
        """Greedy actions [B, K] bool for normalised inputs [B, 3, H, W]."""

    @abstractmethod
    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Logits [B, N] float32."""

    def _run_under(self, images: Tensor, policies: Tensor) -> Tensor:
        """Logits [V, B, N] under policies [V, B, K]."""
        return torch.stack([self._run(images, actions).logits for actions in policies])

    def _classify_under(self, inputs: Tensor, policies: Tensor) -> Tensor:
        """Logits [V, B, N] under policies [V, B, K]."""
        return torch.stack([self._classify(inputs, actions) for actions in policies])
