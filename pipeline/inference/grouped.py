"""Run the images of one policy together: neither gather nor scatter between the blocks.

Shapes: B images, K blocks, G distinct policies.
"""

import torch
from torch import Tensor

from pipeline.inference.gather import FusedExecutor, in_parts
from pipeline.inference.threads import map_torch


class Grouped(FusedExecutor):
    """Best with few distinct policies. If every image has its own, it is a loop over single images."""

    name = "grouped"

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        if len(inputs) == 1:
            return self._group(inputs, actions[0].tolist())
        policies, group_of = torch.unique(actions, dim=0, return_inverse=True)  # [G, K], [B]
        order = group_of.argsort(stable=True)  # [B], images of one policy beside each other
        ends = torch.bincount(group_of, minlength=len(policies)).cumsum(0).tolist()
        groups = [  # (rows, policy); a large group is split over the threads
            (order[start:end][part], policy)
            for start, end, policy in zip([0, *ends], ends, policies.tolist(), strict=False)
            for part in in_parts(end - start, self.threads)
        ]
        # the most work first, so that no thread begins the longest group when the others are done
        groups.sort(key=lambda group: -len(group[0]) * (1 + sum(group[1])))
        parts = map_torch(
            lambda group: self._group(inputs[group[0]], group[1]), groups, threads=self.threads
        )
        logits = torch.cat(parts)  # [B, N], by group
        rows = torch.cat([rows for rows, _ in groups])
        return torch.empty_like(logits).index_copy_(0, rows, logits)  # in the order of the images

    @torch.no_grad()
    def _group(self, inputs: Tensor, policy: list[bool]) -> Tensor:
        return self.network.forward(self._prepared(inputs), policy)
