"""Cut inner channels out of a network."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.architectures import InnerChannels
from pipeline.models.resnet import Block, ResNet
from pipeline.pruning.importance import Importances

Kept = Sequence[Sequence[Tensor]]  # indices of the channels that stay, of each inner convolution


def most_important(importances: Importances, channels: InnerChannels) -> Kept:
    """The indices of so many channels of each inner convolution, in rising order."""
    return [
        [score.topk(count).indices.sort().values for score, count in zip(scores, counts, strict=True)]
        for scores, counts in zip(importances, channels, strict=True)
    ]


def cut(resnet: ResNet, kept: Kept) -> ResNet:
    """A copy that has only the `kept` inner channels, by their indices.

    It computes what `resnet` would with zeros in place of the other channels.
    """
    pruned = copy.deepcopy(resnet)
    for block, before, indices in zip(pruned.flat_blocks(), resnet.flat_blocks(), kept, strict=True):
        block.narrow([len(channels) for channels in indices])
        _copy_channels(before, block, indices)
    pruned.to(resnet.fc.weight.device).to(memory_format=torch.channels_last)
    return pruned.train(resnet.training)


@torch.no_grad()
def _copy_channels(before: Block, block: Block, indices: Sequence[Tensor]) -> None:
    every: Tensor | slice = slice(None)  # the block's input and output channels
    pairs = zip(before.convolutions(), block.convolutions(), strict=True)
    channels = pairwise([every, *indices, every])
    for ((old_conv, old_bn), (conv, bn)), (inputs, outputs) in zip(pairs, channels, strict=True):
        conv.weight.copy_(old_conv.weight[outputs][:, inputs])
        old_tensors = old_bn.state_dict()
        bn.load_state_dict(
            {name: old if old.dim() == 0 else old[outputs] for name, old in old_tensors.items()}
        )
