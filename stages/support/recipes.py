"""From the values of params.yaml to what the library trains with."""

from collections.abc import Callable
from functools import partial

import torch

from pipeline.config import Curriculum, Finetune, Params, Pretrain
from pipeline.data.transforms import AnyAugmentation, Augmentation, Normalisation, SeededCrop
from pipeline.models.resnet import ResNet
from pipeline.training import optim
from pipeline.training.distillation import Distillation
from pipeline.training.optim import make_optimizer

STEP_AT = 0.8  # of a training, where the schedule `step` falls to x0.1; the authors: epoch 1600 of 2000


def normalisation_of(params: Params) -> Normalisation:
    return Normalisation(mean=params.resnet.mean, std=params.resnet.std)


def augmentation_of(params: Params) -> AnyAugmentation:
    """The random changes to training images, in the form that the data set takes."""
    section = params.augmentation
    if params.data.source == "imagefolder_stream":
        return SeededCrop(flip=section.flip)
    return Augmentation(crop_padding=section.crop_padding, flip=section.flip)


def schedule_of(section: Pretrain | Curriculum | Finetune) -> Callable[[float], float]:
    """The factor of the learning rates at each fraction of the training done."""
    warmup = section.warmup_fraction if isinstance(section, Pretrain) else 0.0
    if section.schedule == "cosine":  # it falls over what the warm-up leaves
        return partial(optim.cosine, warmup=warmup)
    step_down = partial(optim.step_down, at=STEP_AT)
    schedule = optim.constant if section.schedule == "constant" else step_down
    return partial(optim.warmed_up, warmup=warmup, schedule=schedule)


def resnet_optimizer_of(resnet: ResNet, section: Pretrain | Finetune) -> torch.optim.Optimizer:
    """The optimiser of the whole ResNet: pretrain's, or finetune's beside a policy or a static rule."""
    return make_optimizer(
        section.optimizer,
        [{"params": list(resnet.parameters()), "lr": section.lr}],
        weight_decay=section.weight_decay,
    )


def distillation_of(teacher: ResNet, section: Finetune, params: Params) -> Distillation:
    """The loss of a ResNet that is finetuned, with a copy of `teacher` as it is now."""
    return Distillation(
        teacher,
        teacher_weight=section.distillation,
        normalisation=normalisation_of(params),
        precision=section.precision,
    )
