"""How many inner channels each block keeps: one ratio for all, or what each stage can spare."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from pipeline.architectures import InnerChannels, kept_channels
from pipeline.flops import measure
from pipeline.models.resnet import ResNet
from pipeline.pruning.importance import Importances
from pipeline.pruning.surgery import cut, most_important

# that are tried on each stage beside the one that is asked for
RATIOS = tuple(tenth / 10 for tenth in range(1, 10))


def uniform(resnet: ResNet, ratio: float) -> InnerChannels:
    """The same ratio in every block."""
    return tuple(
        tuple(kept_channels(count, ratio) for count in block) for block in resnet.inner_channels
    )


def by_sensitivity(
    resnet: ResNet,
    importances: Importances,
    *,
    ratio: float,
    image_size: int,
    accuracy_of: Callable[[ResNet], float],
) -> InnerChannels:
    """A ratio for each stage: no more FLOPs than `uniform` has, the least loss of accuracy.

    Each stage is pruned alone, by each ratio that is tried, and not finetuned (Li et al. 2017, section
    3.2). What several stages lose together is taken as the sum of what each loses alone.

    Args:
        accuracy_of: on images that are neither trained nor tested on.
    """

    def pruned(channels: InnerChannels) -> ResNet:
        return cut(resnet, most_important(importances, channels))

    def block_flops(channels: InnerChannels) -> int:
        return sum(measure(pruned(channels), None, image_size).blocks)

    full, stages = resnet.inner_channels, range(len(resnet.stages))
    every_block, budget = block_flops(full), block_flops(uniform(resnet, ratio))
    full_accuracy = accuracy_of(resnet)
    # of each stage: the network in which it is pruned, with the accuracy lost and the FLOPs saved
    options: list[dict[InnerChannels, tuple[float, int]]] = []
    for stage in stages:
        options.append({full: (0.0, 0)})
        for channels in _stage_options(resnet, stage, [*RATIOS, ratio]):
            lost = full_accuracy - accuracy_of(pruned(channels))
            options[-1][channels] = lost, every_block - block_flops(channels)
    best = min(
        (
            combination
            for combination in product(*(stage_options.items() for stage_options in options))
            if every_block - sum(saved for _, (_, saved) in combination) <= budget
        ),
        # of equal losses the one that saves most, then a fixed one
        key=lambda combination: (
            sum(lost for _, (lost, _) in combination),
            -sum(saved for _, (_, saved) in combination),
            [channels for channels, _ in combination],
        ),
    )
    stage_of = [stage for stage in stages for _ in range(resnet.stages[stage])]
    return tuple(best[stage][0][block] for block, stage in enumerate(stage_of))


def _stage_options(resnet: ResNet, stage: int, ratios: Sequence[float]) -> Iterator[InnerChannels]:
    """The network with one stage pruned by each ratio that makes a difference, none of them twice."""
    first = sum(resnet.stages[:stage])
    of_stage = range(first, first + resnet.stages[stage])
    full, found = resnet.inner_channels, set[InnerChannels]()
    for ratio in ratios:
        pruned = uniform(resnet, ratio)
        channels = tuple(
            pruned[block] if block in of_stage else full[block] for block in range(len(full))
        )
        if channels != full and channels not in found:
            found.add(channels)
            yield channels
