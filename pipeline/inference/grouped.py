"""Run the images of one policy together: neither gather nor scatter between the blocks.

Shapes: B images, K blocks, G distinct policies.
"""

import torch
from torch import Tensor

from pipeline.inference.gather import Packed, in_parts
from pipeline.inference.threads import map_torch


class Grouped(Packed):
    """Best with few distinct policies; with as many as images it is a loop over single images."""

    name = "grouped"

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        policies, group_of = torch.unique(actions, dim=0, return_inverse=True)
        order = group_of.argsort(stable=True)
        ends = torch.bincount(group_of, minlength=len(policies)).cumsum(0).tolist()
        groups = [
            (order[start:end][part], policy)
            for start, end, policy in zip([0, *ends], ends, policies.tolist(), strict=False)
            for part in in_parts(end - start, self.workers)
        ]
        groups.sort(key=lambda group: -len(group[0]) * (1 + sum(group[1])))  # the long ones first
        run = torch.no_grad()(lambda group: self._group(inputs[group[0]], group[1]))
        found = map_torch(run, groups, workers=self.workers)
        rows = torch.cat([rows for rows, _ in groups])
        logits = torch.cat(found)
        return torch.empty_like(logits).index_copy_(0, rows, logits)

    def _group(self, inputs: Tensor, policy: list[bool]) -> Tensor:
        x = self._stem(inputs)
        for block, keep in zip(self.network.blocks, policy, strict=True):
            skipped = block.skip(x)
            x = block.keep_(x, skipped) if keep else skipped
        return self.network.head(x)
