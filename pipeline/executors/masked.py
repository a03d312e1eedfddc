"""The reference, and what public code of this family does above batch 1: run, then throw away."""

import torch
from torch import Tensor

from pipeline.executors.base import Executor, Networks
from pipeline.policies import greedy_actions
from pipeline.runtime import autocast


class Masked(Executor):
    """The networks as they were trained, a block on every image and its result only where it is kept.

    As in the authors' code, it skips a block only when no image of the batch keeps it.
    """

    name = "masked"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        networks.resnet.eval()
        if networks.policy_net is not None:
            networks.policy_net.eval()

    def _decide(self, inputs: Tensor) -> Tensor:
        assert self.networks.policy_net is not None
        with autocast(self.device, self.precision):
            return greedy_actions(torch.sigmoid(self.networks.policy_net(inputs.float()).float()))

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        resnet = self.networks.resnet
        with autocast(self.device, self.precision):
            x = resnet.stem(inputs.float())
            used = actions.any(dim=0).tolist()
            for index, block in enumerate(resnet.flat_blocks()):
                skipped = block.shortcut(x)
                if used[index]:
                    keep = actions[:, index, None, None, None]
                    x = torch.where(keep, torch.relu(skipped + block.residual(x)), skipped)
                else:
                    x = skipped
            return resnet.head(x).float()
