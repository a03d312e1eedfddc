"""pretrain: train the ResNet with every block, or import one."""

from functools import partial

from pipeline.config import Params
from pipeline.data.metadata import load_classes
from pipeline.device import choose_device, seed_everything
from pipeline.infra.processes import is_main
from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.resnet import ResNet
from pipeline.training.loop import Metrics
from stages.support import common, training


def main(params: Params) -> None:
    """Write models/pretrain."""
    classes = load_classes(common.PREPARED)

    def save(resnet: ResNet, metrics: Metrics) -> None:
        made = training.full_network("pretrain", resnet, params, metrics)
        checkpoint.save(made, common.PRETRAINED)

    path = training.imported(params.checkpoints.pretrain)
    if path is not None:
        found = training.import_resnet(path, params, classes, depth=params.resnet.depth)
        if is_main():
            save(found, {})
            training.record_import("pretrain", params, path)
        return
    seed_everything(params.seed, "pretrain")
    resnet = make_resnet(
        family=params.resnet.family,
        depth=params.resnet.depth,
        width=params.resnet.width,
        num_classes=len(classes),
    ).to(choose_device())
    learner = training.pretraining(resnet, params)
    section = params.pretrain
    training.train("pretrain", learner, params, section, [common.PREPARED], partial(save, resnet))


if __name__ == "__main__":
    common.run(main, trains=True)
