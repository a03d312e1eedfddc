"""Trainings that tests run by one process, and by several: `python in_processes.py FOLDER` in each.

Each gives what it left: weights, buffers, gradients, optimiser, and what `fit` yielded.
"""

import itertools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from builders import NORMALISATION, make_split
from torch import nn

from pipeline import distributed
from pipeline.data.transforms import Augmentation
from pipeline.infra import processes
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import BatchNorm, ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.static_policies import static_rule
from pipeline.training.classification import Classification
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Learner, Position, fit
from pipeline.training.optim import constant, make_optimizer


def resnet() -> ResNet:
    torch.manual_seed(0)
    return cifar_resnet(depth=14, width=4, num_classes=3)


def classification(*, optimizer: str = "sgd", **options) -> Classification:
    made = resnet()
    groups = [{"params": list(made.parameters()), "lr": 0.01}]
    return Classification(
        made,
        optimizer=make_optimizer(optimizer, groups, weight_decay=0.01),
        normalisation=NORMALISATION,
        precision="fp32",
        **options,
    )


def one_value() -> dict:
    """A step of batch norm on one value of each channel, which one process has."""
    torch.manual_seed(0)
    norm = BatchNorm(3)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1), norm)
    image = torch.randn(1, 2, 1, 1)
    distributed.broadcast_modules([network])
    out = network(image[distributed.shard_rows(torch.arange(1))])
    out.square().sum().backward()
    distributed.all_reduce_gradients(network.parameters())
    return {
        "weights": network.state_dict(),
        "gradients": [p.grad for p in network.parameters()],
        "out": distributed.all_reduce_sum({"out": out.detach().sum()}),
    }


def policy(*, finetune: bool, optimizer: str = "adam", **objective: str | int | None) -> PolicyLearner:
    networks = resnet(), PolicyNet(num_blocks=6, width=4)
    common = {"normalisation": NORMALISATION, "precision": "fp32"}
    groups = [{"params": list(networks[1].parameters()), "lr": 0.01}]
    distillation = None
    if finetune:
        groups.append({"params": list(networks[0].parameters()), "lr": 0.001})
        distillation = Distillation(networks[0], teacher_weight=0.5, **common)
    return PolicyLearner(
        *networks,
        optimizer=make_optimizer(optimizer, groups, weight_decay=0.01),
        objective=PolicyObjective(
            gamma=2.0,
            alpha=0.8,
            entropy_coef=0.01,
            marginal_entropy_coef=0.1 if finetune else 0.0,
            epochs_per_block=None if finetune else 0.5,
            num_flips=2,
            **objective,
        ),
        distillation=distillation,
        **common,
    )


def by_row(noise: torch.Tensor) -> torch.Tensor:
    """Actions of few images a block: often of one process's alone, sometimes of none's. [B, K] bool."""
    chance = torch.tensor([1.0, 0.5, 0.15, 0.15, 0.05, 0.0])
    return noise < chance


def trained(
    learner: Learner,
    *,
    images: int = 48,
    batch_size: int = 16,
    epochs: int = 2,
    position: Position | None = None,
    stop: int | None = None,
) -> dict:
    """What a training leaves, or so many steps of one."""
    with torch.no_grad():
        for parameter in itertools.chain(*(module.parameters() for module in learner.modules.values())):
            parameter.add_(distributed.current_rank().rank)  # the weights of process 0 are what counts
    distributed.broadcast_modules(learner.modules.values())
    every = fit(
        learner,
        train=make_split(images),
        validation=make_split(24, seed=1),
        epochs=epochs,
        batch_size=batch_size,
        schedule=constant,
        augmentation=Augmentation(crop_padding=1, flip=True),
        normalisation=NORMALISATION,
        key=(0, "test"),
        position=position or Position(),
    )
    results = list(itertools.islice(every, stop))
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    return {
        "weights": {
            f"{name}.{key}": value
            for name, module in learner.modules.items()
            for key, value in module.state_dict().items()
        },
        "gradients": [p.grad for p in parameters],
        "optimizer": learner.optimizer.state_dict()["state"],
        "steps": results.count(None),
        "results": [
            {
                "train": r.train,
                "validation": r.validation,
                "first_nonfinite_step": r.first_nonfinite_step,
            }
            for r in results
            if r is not None
        ],
    }


def interrupted() -> dict:
    """The case finetune, after whose second epoch has begun process 0 tells the others where it is."""
    first, position = finetuning(), Position()
    trained(first, position=position, stop=5)  # four steps, and the end of the first epoch
    networks = {name: module.state_dict() for name, module in first.modules.items()}
    state = networks, first.optimizer.state_dict(), position
    networks, optimizer, position = distributed.broadcast_from_rank0(lambda: state)
    second = finetuning()
    for name, module in second.modules.items():
        module.load_state_dict(networks[name])
    second.optimizer.load_state_dict(optimizer)
    return trained(second, position=position)


def finetuning(**objective: str | int) -> PolicyLearner:
    """By SGD: Adam would make whole steps of the float noise of gradients that are next to nothing."""
    return policy(finetune=True, optimizer="sgd", **objective)


ONE_IMAGE = {"images": 5, "batch_size": 1, "epochs": 1}  # a batch: the second process has none
CASES: dict[str, Callable[[], dict]] = {
    "pretrain": lambda: trained(classification(label_smoothing=0.1)),
    "curriculum": lambda: trained(policy(finetune=False), epochs=4),
    "finetune": lambda: trained(finetuning()),
    "local expectation": lambda: trained(
        policy(finetune=False, estimator="local_expectation"), epochs=4
    ),
    "straight through": lambda: trained(finetuning(estimator="straight_through")),
    "interrupted": interrupted,
    "static": lambda: trained(classification(rule=static_rule("random", 3), optimizer="adam")),
    "uneven": lambda: trained(classification(), images=37),  # batches of 13, 12 and 12 images
    "no rows": lambda: trained(finetuning(), **ONE_IMAGE),
    "reinmax": lambda: trained(finetuning(estimator="reinmax", train_epochs=1)),
    "held": lambda: trained(finetuning(frozen_epochs=1)),
    "no rows reinmax": lambda: trained(finetuning(estimator="reinmax"), **ONE_IMAGE),
    "one value": one_value,
    "some blocks": lambda: trained(classification(rule=by_row), batch_size=4, epochs=1),
}


if __name__ == "__main__":
    processes.COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # one that waits in vain fails the test
    with processes.process_group(torch.device("cpu")):
        made = {name: make() for name, make in CASES.items()}
        torch.save(made, Path(sys.argv[1]) / f"{distributed.current_rank().rank}.pt")
