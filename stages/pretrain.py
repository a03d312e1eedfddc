"""pretrain: train the ResNet with every block, or import one."""

from pathlib import Path

from pipeline.config import Params
from pipeline.data.metadata import load_classes
from pipeline.device import choose_device, seed_everything
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import Checkpoint
from pipeline.training.classification import Classification
from stages.support import common, compatibility, recipes, training


def main(params: Params) -> None:
    classes = load_classes(common.PREPARED)

    def load(path: Path) -> Checkpoint:
        resnet = compatibility.load_resnet(path, params, classes, depth=params.resnet.depth)
        return recipes.full_network("pretrain", resnet, params)

    def build() -> tuple[Classification, Checkpoint]:
        seed_everything(params.seed, "pretrain")
        resnet = make_resnet(
            family=params.resnet.family,
            depth=params.resnet.depth,
            width=params.resnet.width,
            num_classes=len(classes),
        ).to(choose_device())
        learner = recipes.pretraining_of(resnet, params)
        return learner, recipes.full_network("pretrain", resnet, params)

    training.run("pretrain", params, params.pretrain, load=load, build=build)


if __name__ == "__main__":
    common.run(main, trains=True)
