"""sole: a ResNet of another depth with every block, by pretrain's recipe: `python -m stages.sole DEPTH`.

What a smaller network of the same cost can do. It is trained also when pretrain imports, unless
checkpoints.sole names a folder that has it.
"""

import argparse
from functools import partial

from pipeline.config import Params
from pipeline.data.metadata import load_classes
from pipeline.device import choose_device, seed_everything
from pipeline.infra.errors import UserError
from pipeline.infra.processes import is_main
from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.resnet import ResNet
from pipeline.training.loop import Metrics
from stages.support import common, training


def main(params: Params, *, depth: int) -> None:
    """Write models/sole/DEPTH.

    Raises:
        UserError: params.yaml does not name the depth.
    """
    if depth not in params.sole.depths:
        raise UserError(f"sole.depths {list(params.sole.depths)} does not name {depth}; add it there")
    classes = load_classes(common.PREPARED)

    def save(resnet: ResNet, metrics: Metrics) -> None:
        made = training.full_network("sole", resnet, params, metrics)
        checkpoint.save(made, common.SOLE / str(depth))

    folder = training.imported(params.checkpoints.sole)
    if folder is not None:
        found = training.import_resnet(folder / str(depth), params, classes, depth=depth)
        if is_main():
            save(found, {})
            training.record_import("sole", params, folder / str(depth), item=str(depth))
        return
    seed_everything(params.seed, "sole", depth)
    resnet = make_resnet(
        family=params.resnet.family,
        depth=depth,
        width=params.resnet.width,
        num_classes=len(classes),
    ).to(choose_device())

    learner = training.pretraining(resnet, params)
    section = params.pretrain
    inputs = [common.PREPARED]
    training.train("sole", learner, params, section, inputs, partial(save, resnet), item=str(depth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    common.run(partial(main, depth=parser.parse_args().depth), trains=True)
