"""pretrain: train the ResNet with every block, or import one."""

from functools import partial

from pipeline import checkpoint
from pipeline.params import Params
from pipeline.prepared import load_classes
from pipeline.processes import is_main
from pipeline.resnet import ResNet, make_resnet
from pipeline.runtime import choose_device, seed_everything
from pipeline.training import Metrics
from stages import common, trainer


def main(params: Params) -> None:
    """Write models/pretrain."""
    classes = load_classes(common.PREPARED)

    def save(resnet: ResNet, metrics: Metrics) -> None:
        made = trainer.full_network("pretrain", resnet, params, metrics)
        checkpoint.save(made, common.PRETRAINED)

    path = trainer.imported(params.pretrain)
    if path is not None:
        found = trainer.import_resnet(path, params, classes, depth=params.resnet.depth)
        if is_main():
            save(found, {})
            trainer.record_import("pretrain", params, path)
        return
    seed_everything(params.seed, "pretrain")
    resnet = make_resnet(
        family=params.resnet.family,
        depth=params.resnet.depth,
        width=params.resnet.width,
        num_classes=len(classes),
    ).to(choose_device())
    learner = trainer.pretraining(resnet, params)
    section = params.pretrain
    trainer.train("pretrain", learner, params, section, [common.PREPARED], partial(save, resnet))


if __name__ == "__main__":
    common.run(main, trains=True)
