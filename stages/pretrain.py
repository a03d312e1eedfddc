"""pretrain: train the ResNet with every block, or import one."""

from functools import partial
from pathlib import Path

from pipeline import checkpoint, legacy
from pipeline.data import load_classes
from pipeline.params import Params
from pipeline.processes import is_main
from pipeline.resnet import ResNet, make_resnet
from pipeline.runtime import choose_device, seed_everything
from pipeline.training import Metrics
from stages import common, trainer


def import_resnet(path: Path, params: Params, classes: tuple[str, ...]) -> ResNet:
    """The ResNet of our own or the authors' checkpoint, when it is the one params.yaml describes."""
    if path.is_dir():
        own = checkpoint.load(path)
        trainer.require_same(
            path, "input normalisation", own.normalisation, trainer.normalisation_of(params),
            "set resnet.mean and resnet.std in params.yaml to the checkpoint's",
        )  # fmt: skip
        trainer.require_same(
            path, "list of classes", own.classes, classes, "set data in params.yaml to its data set"
        )
        resnet = own.need_resnet()
    else:
        resnet = legacy.load(path).need_resnet(path)
    trainer.require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (params.resnet.family, params.resnet.depth, params.resnet.width, len(classes)),
        "set resnet.family, resnet.depth, resnet.width and data in params.yaml to the checkpoint's",
    )  # fmt: skip
    return resnet


def main(params: Params) -> None:
    """Write models/pretrain."""
    classes = load_classes(common.PREPARED)

    def save(resnet: ResNet, metrics: Metrics) -> None:
        made = trainer.full_network("pretrain", resnet, params, metrics)
        checkpoint.save(made, common.PRETRAINED)

    path = trainer.imported(params.pretrain)
    if path is not None:
        found = import_resnet(path, params, classes)
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
