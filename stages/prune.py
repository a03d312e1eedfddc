"""prune: take channels from inside the blocks, and finetune what is left, every block of it.

The paper has no such stage: pruning and dropping blocks are independent, and here both can be had. With
`prune.ratio` 0, the default, pretrain's checkpoint is passed on as it is.
"""

from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.device import choose_device, generator
from pipeline.flops import measure
from pipeline.inference.predict import predict
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.resnet import ResNet
from pipeline.pruning.allocation import by_sensitivity, uniform
from pipeline.pruning.importance import importances
from pipeline.pruning.surgery import Kept, cut, most_important
from pipeline.training.classification import Classification
from stages.support import common, compatibility, recipes, training

STAGE = "prune"


def kept_channels(params: Params, pretrained: Checkpoint) -> Kept:
    """Which inner channels of pretrain's ResNet params.yaml keeps."""
    section, device = params.prune, choose_device()
    resnet, normalisation = pretrained.need_resnet(), pretrained.normalisation
    scores = importances(
        section.criterion,
        resnet,
        load_split(common.PREPARED, "train", device),
        normalisation,
        generator(params.seed, STAGE),
    )
    if section.scope == "uniform":
        return most_important(scores, uniform(resnet, section.ratio))
    validation = load_split(common.PREPARED, "validation", device)

    def accuracy_of(candidate: ResNet) -> float:
        accuracy = predict(candidate, validation, normalisation=normalisation).accuracy
        print(f"{STAGE}: {in_words(candidate, resnet)}: {accuracy:.2%} of validation images", flush=True)
        return accuracy

    channels = by_sensitivity(
        resnet,
        scores,
        ratio=section.ratio,
        image_size=params.data.image_size,
        accuracy_of=accuracy_of,
    )
    return most_important(scores, channels)


def in_words(pruned: ResNet, resnet: ResNet) -> str:
    """The inner channels of each stage's first block, before and after."""
    firsts = list(accumulate(resnet.stages[:-1], initial=0))
    now, before = (
        ", ".join(str(network.inner_channels[first][0]) for first in firsts)
        for network in (pruned, resnet)
    )
    return f"{now} of {before} channels inside the blocks of the stages"


def main(params: Params) -> None:
    """Write models/prune."""
    pretrained = checkpoint.load(common.PRETRAINED)
    section = params.prune
    if not section.ratio and not training.imported_path(params.checkpoints.prune):
        training.pass_on(STAGE, params, pretrained, "ratio 0, pretrain's ResNet as it is")
        return

    def load(path: Path) -> Checkpoint:
        resnet = compatibility.load_resnet(
            path, params, pretrained.classes, depth=params.resnet.depth, pruned=True
        )
        if section.scope == "uniform":
            compatibility.require_same(
                path, "channels inside the blocks", resnet.inner_channels,
                uniform(pretrained.need_resnet(), section.ratio),
                "set prune.ratio in params.yaml to the checkpoint's, or prune.scope to sensitivity",
            )  # fmt: skip
        return replace(pretrained, stage=STAGE, resnet=resnet)

    def build() -> tuple[Classification, Checkpoint]:
        full = pretrained.need_resnet().to(choose_device())
        # once: if it rounded otherwise, a killed training would go on with other channels
        kept = training.before_training(STAGE, params, partial(kept_channels, params, pretrained))
        resnet = cut(full, kept)
        cost = measure(resnet, None, params.data.image_size)
        print(f"{STAGE}: {in_words(resnet, full)}, {cost.every_block / cost.full:.1%} of the FLOPs")
        learner = Classification(
            resnet,
            optimizer=recipes.resnet_optimizer_of(resnet, section),
            normalisation=pretrained.normalisation,
            precision=section.precision,
            distillation=recipes.distillation_of(full, section, params),
        )
        return learner, replace(pretrained, stage=STAGE, resnet=resnet)

    training.run(STAGE, params, section, load=load, build=build)


if __name__ == "__main__":
    common.run(main, trains=True)
