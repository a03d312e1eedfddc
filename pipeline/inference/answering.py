"""A policy network that classifies, and may answer itself, beside any executor of the ResNet.

Shapes: B images, K blocks, N classes, V policies, R images for which the ResNet runs.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.inference.base import Executor, Networks, Output
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import average_down


class Answering(Executor):
    """Runs the policy network on every image, and the ResNet on the images that need it.

    Where an image keeps no block and the policy network answers, the ResNet's stem and head are not run
    either. Where blocks run, both networks' answers are averaged. `native` needs none of this: its C++
    runs both networks and decides between them.

    Args:
        make: builds the executor of either network.
    """

    def __init__(
        self, networks: Networks, make: Callable[[Networks], Executor], *, precision: str = "fp32"
    ) -> None:
        super().__init__(networks, precision=precision)
        policy_net = networks.policy_net
        assert policy_net is not None
        assert policy_net.path_values is not None
        self.input_size = policy_net.input_size
        self.answers = policy_net.answers
        self.values: PathValues = policy_net.path_values
        # a policy network is a ResNet as well, all of whose blocks run
        self.classifier = make(replace(networks, resnet=policy_net.features, policy_net=None))
        self.resnet = make(replace(networks, policy_net=None))
        self.name = self.resnet.name  # type: ignore[misc]

    @property
    def description(self) -> str:
        """The executors that are used here."""
        return getattr(self.resnet, "description", self.resnet.name)

    def free(self) -> None:
        self.classifier.free()
        self.resnet.free()

    def _class_logits(self, inputs: Tensor) -> Tensor:
        """The policy network's, [B, N], of normalised inputs [B, 3, H, W]."""
        small = average_down(inputs, self.input_size)
        every_block = torch.ones(
            len(inputs), self.classifier.networks.num_blocks, dtype=torch.bool, device=inputs.device
        )
        return self.classifier.classify(small, every_block)

    def _run(self, images: Tensor, actions: Tensor | None) -> Output:
        size = self.input_size
        if size is None or size == images.shape[1]:  # normalised by the executor
            class_logits = self.classifier(images).logits
        else:
            class_logits = self._class_logits(self.networks.normalisation(images))
        if actions is None:
            actions = self.values(class_logits) >= 0
        return Output(
            logits=self._combined(
                class_logits, actions, lambda rows, kept: self.resnet(images[rows], kept).logits
            ),
            actions=actions,
        )

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        return self._combined(
            self._class_logits(inputs),
            actions,
            lambda rows, kept: self.resnet.classify(inputs[rows], kept),
        )

    def _combined(
        self, class_logits: Tensor, actions: Tensor, run: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Logits [B, N] under actions [B, K].

        Args:
            class_logits: the policy network's, [B, N].
            run: from rows [R] and their actions [R, K] to the ResNet's logits [R, N].
        """
        logits = self.values.average.log_probs(class_logits)  # [B, N]
        rows = torch.arange(len(actions), device=actions.device)
        if self.answers:
            rows = rows[actions.any(dim=1)]  # [R]
        if len(rows):
            resnet_logits = run(rows, actions[rows])
            logits[rows] = self.values.average(class_logits[rows], resnet_logits)
        return logits

    def _decide(self, inputs: Tensor) -> Tensor:
        return self.values(self._class_logits(inputs)) >= 0
