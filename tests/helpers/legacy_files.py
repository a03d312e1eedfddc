"""What several test modules make: legacy_files."""

import torch

from pipeline.models.resnet import ResNet


def staged(network: ResNet, pattern: str) -> dict[str, torch.Tensor]:
    """Weights under the authors' names: blocks by stage, no batch counters."""
    per_stage = len(network.blocks) // 3
    weights = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            stage, block = divmod(int(index), per_stage)
            name = f"{pattern.format(stage=stage, number=stage + 1)}.{block}.{rest}"
        weights[name] = tensor.clone()
    return weights


def as_layers(network: ResNet) -> dict[str, torch.Tensor]:
    return staged(network, "layer{number}")
