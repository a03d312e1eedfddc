"""pretrain: train the ResNet with every block, or import one."""

from pathlib import Path

from pipeline import checkpoint, legacy
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.data import load_classes
from pipeline.params import Params
from pipeline.resnet import ResNet
from pipeline.runtime import choose_device, seed_everything
from pipeline.tensors import Normalisation
from pipeline.training import Classification, make_optimizer
from stages import common, trainer


def normalisation_of(params: Params) -> Normalisation:
    """The input normalisation that params.yaml asks for."""
    return Normalisation(mean=params.resnet.mean, std=params.resnet.std)


def import_resnet(path: Path, params: Params, num_classes: int) -> ResNet:
    """The ResNet of our own or the authors' checkpoint, when it is the one params.yaml describes."""
    if path.is_dir():
        own = checkpoint.load(path)
        found, wanted = own.normalisation, normalisation_of(params)
        if found != wanted:
            raise CheckpointError(
                f"{path} was trained on inputs normalised by mean {found.mean} and std {found.std}; "
                f"set resnet.mean and resnet.std to these (they are {wanted.mean} and {wanted.std})"
            )
        resnet = own.need_resnet()
    else:
        resnet = legacy.load(path).need_resnet(path)
    given = (resnet.depth, resnet.width, resnet.num_classes)
    asked = (params.resnet.depth, params.resnet.width, num_classes)
    if given != asked:
        raise CheckpointError(
            f"{path} is a ResNet of depth {given[0]}, width {given[1]} and {given[2]} classes; "
            f"resnet.depth, resnet.width and the data say {asked[0]}, {asked[1]} and {asked[2]}"
        )
    return resnet


def main(params: Params) -> None:
    """Write models/pretrain."""
    classes = load_classes(common.PREPARED)
    path = trainer.imported(params.pretrain)
    if path is not None:
        resnet = import_resnet(path, params, len(classes))
        trainer.write_untrained("pretrain")
        metrics: dict[str, float] = {}
        print(f"pretrain: imported {path}")
    else:
        seed_everything(params.seed, "pretrain")
        resnet = ResNet(
            depth=params.resnet.depth, width=params.resnet.width, num_classes=len(classes)
        ).to(choose_device())
        section = params.pretrain
        learner = Classification(
            resnet,
            optimizer=make_optimizer(
                section.optimizer,
                [{"params": list(resnet.parameters()), "lr": section.lr}],
                weight_decay=section.weight_decay,
            ),
            normalisation=normalisation_of(params),
            precision=section.precision,
            label_smoothing=section.label_smoothing,
        )
        metrics = trainer.train("pretrain", learner, params, section, [common.PREPARED])
    checkpoint.save(
        Checkpoint(
            stage="pretrain",
            resnet=resnet,
            policy_net=None,
            normalisation=normalisation_of(params),
            classes=classes,
            metrics=metrics,
        ),
        common.PRETRAINED,
    )


if __name__ == "__main__":
    common.run(main)
