"""sole: a ResNet of another depth with every block, by pretrain's recipe: `python -m stages.sole DEPTH`.

It shows what a smaller network of the same cost can do. It is trained also when pretrain imports, unless
checkpoints.sole names a folder that has it.
"""

import argparse
from functools import partial
from pathlib import Path

from pipeline.config import Params
from pipeline.data.metadata import load_classes
from pipeline.device import choose_device, seed_everything
from pipeline.infra.errors import UserError
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import Checkpoint
from pipeline.training.classification import Classification
from stages.support import common, compatibility, recipes, training


def main(params: Params, *, depth: int) -> None:
    if depth not in params.sole.depths:
        raise UserError(f"sole.depths {list(params.sole.depths)} does not name {depth}; add it there")
    classes = load_classes(common.PREPARED)

    def load(path: Path) -> Checkpoint:
        resnet = compatibility.load_resnet(path, params, classes, depth=depth)
        return recipes.full_network("sole", resnet, params)

    def build() -> tuple[Classification, Checkpoint]:
        seed_everything(params.seed, "sole", depth)
        resnet = make_resnet(
            family=params.resnet.family,
            depth=depth,
            width=params.resnet.width,
            num_classes=len(classes),
        ).to(choose_device())
        learner = recipes.pretraining_of(resnet, params)
        return learner, recipes.full_network("sole", resnet, params)

    training.run("sole", params, params.pretrain, load=load, build=build, item=str(depth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    common.run(partial(main, depth=parser.parse_args().depth), trains=True)
