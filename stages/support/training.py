"""What the training stages share: the loop's input and output, recipes, and importing instead."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from pipeline import distributed
from pipeline.config import NO_FILE, Finetune, Params, Pretrain
from pipeline.data.dataset import load_split
from pipeline.data.metadata import load_classes
from pipeline.data.transforms import AnyAugmentation, Augmentation, Normalisation, SeededCrop
from pipeline.device import choose_device, computes_in_bf16, describe_device, keep_freed_memory
from pipeline.infra import processes
from pipeline.infra.errors import UserError
from pipeline.infra.resume import ResumePoint, digest_of_files, key_of, tidy
from pipeline.infra.signals import deferred_signals
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.tracking.runs import stage_run
from pipeline.training import legacy_checkpoints, loop, optim
from pipeline.training.classification import Classification
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Metrics
from pipeline.training.optim import make_optimizer
from stages.support.common import (
    METRICS,
    MODELS,
    PLOTS,
    PREPARED,
    require_seen,
    require_writable,
    write_csv,
    write_json,
    write_times,
)
from stages.support.inputs import code_of, params_of, require_unchanged
from stages.support.progress import Progress
from stages.support.spared_cores import SparedCores
from stages.support.training_state import FORMAT, Checkpointer, TrainingSection, TrainingState

LAST_FIFTH = 0.8  # the schedule `step` takes x0.1 from here; the authors: epoch 1600 of 2000


def imported(checkpoint_path: str) -> Path | None:
    """The checkpoint (of a matrix stage: the folder of several) to take instead of training, if any."""
    if checkpoint_path == NO_FILE:
        return None
    path = Path(checkpoint_path)
    if path.is_dir():  # DVC sees a file that a stage names by itself, hidden or not
        require_seen(path, [file for file in path.rglob("*") if file.is_file()])
    return path


def normalisation_of(params: Params) -> Normalisation:
    """The input normalisation that params.yaml asks for."""
    return Normalisation(mean=params.resnet.mean, std=params.resnet.std)


def augmentation_of(params: Params) -> AnyAugmentation:
    """The random changes to training images that the data set takes."""
    found = params.augmentation
    if params.data.source == "imagefolder_stream":
        return SeededCrop(flip=found.flip)
    return Augmentation(crop_padding=found.crop_padding, flip=found.flip)


def pretraining(resnet: ResNet, params: Params) -> Classification:
    """Pretrain's recipe, for a ResNet of any depth."""
    section = params.pretrain
    return Classification(
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


def resnet_optimizer_of(resnet: ResNet, section: Finetune) -> torch.optim.Optimizer:
    """What finetunes the ResNet, beside a policy or under a static rule."""
    return make_optimizer(
        section.optimizer,
        [{"params": list(resnet.parameters()), "lr": section.lr}],
        weight_decay=section.weight_decay,
    )


def distillation_of(resnet: ResNet, params: Params) -> Distillation:
    """The loss of a ResNet that is finetuned, with itself as it is now as the teacher."""
    section = params.finetune
    return Distillation(
        resnet,
        teacher_weight=section.distillation,
        normalisation=normalisation_of(params),
        precision=section.precision,
    )


def full_network(stage: str, resnet: ResNet, params: Params, metrics: Metrics) -> Checkpoint:
    """The checkpoint of a ResNet that runs every block, for the prepared data set."""
    return Checkpoint(
        stage=stage,
        resnet=resnet,
        policy_net=None,
        normalisation=normalisation_of(params),
        image_size=params.data.image_size,  # the size of data/prepared, on which these stages depend
        classes=load_classes(PREPARED),
        metrics=metrics,
    )


def schedule_of(section: TrainingSection) -> Callable[[float], float]:
    """The learning rate's course over the training that params.yaml asks for."""
    warmup = section.warmup_fraction if isinstance(section, Pretrain) else 0.0
    if section.schedule == "cosine":  # which has only what is left to fall in
        return partial(optim.cosine, warmup=warmup)
    step = partial(optim.step_down, at=LAST_FIFTH)
    schedule = optim.constant if section.schedule == "constant" else step
    return partial(optim.warmed_up, warmup=warmup, schedule=schedule)


def require_same(path: Path, what: str, found: object, wanted: object, remedy: str) -> None:
    """Compare a checkpoint that is imported with what the rest of the pipeline expects.

    Raises:
        CheckpointError: they differ.
    """
    if found != wanted:
        raise CheckpointError(f"{path}: its {what} is {found}, expected {wanted}; {remedy}")


def require_same_image_size(path: Path, own: Checkpoint, params: Params) -> None:
    """Compare the side of the images; the authors' files and our first ones do not say it.

    Raises:
        CheckpointError: they differ.
    """
    if own.image_size is not None:
        require_same(
            path, "image size", own.image_size, params.data.image_size,
            "set data.image_size in params.yaml to the checkpoint's",
        )  # fmt: skip


def require_same_policy_net(path: Path, policy_net: PolicyNet, params: Params) -> None:
    """Compare an imported policy network with the one that params.yaml describes.

    Raises:
        CheckpointError: they differ.
    """
    expected, features, whole = params.policy_net, policy_net.features, params.data.image_size
    require_same(
        path, "policy network's family, depth, width and input_size",
        (features.family, features.depth, features.width, policy_net.input_size or whole),
        (expected.family, expected.depth, expected.width, expected.input_size or whole),
        "set policy_net in params.yaml to the checkpoint's",
    )  # fmt: skip


def import_resnet(path: Path, params: Params, classes: tuple[str, ...], *, depth: int) -> ResNet:
    """The ResNet of our own or the authors' checkpoint, when it is one that params.yaml describes.

    Raises:
        CheckpointError: it can't be read, or is of another network, data set or depth.
    """
    if path.is_dir():
        own = checkpoint.load(path)
        require_same(
            path, "input normalisation", own.normalisation, normalisation_of(params),
            "set resnet.mean and resnet.std in params.yaml to the checkpoint's",
        )  # fmt: skip
        require_same(
            path, "list of classes", own.classes, classes, "set data in params.yaml to its data set"
        )
        require_same_image_size(path, own, params)
        resnet = own.need_resnet()
    else:
        resnet = legacy_checkpoints.load(path).need_resnet(path)
    require_same(
        path, "family, depth, width and number of classes",
        (resnet.family, resnet.depth, resnet.width, resnet.num_classes),
        (params.resnet.family, depth, params.resnet.width, len(classes)),
        "set resnet (or sole.depths) and data in params.yaml to the checkpoint's",
    )  # fmt: skip
    return resnet


def train(
    stage: str,
    learner: loop.Learner,
    params: Params,
    section: TrainingSection,
    inputs: Sequence[Path],
    save: Callable[[Metrics], None],
    *,
    item: str = "",
) -> None:
    """Run a training with a progress bar, MLflow, learning curves and resume points.

    The last epoch is what is kept: to choose the best one would use the validation images twice. With
    0 epochs the networks are kept as they come, and the validation images are asked once.

    Args:
        inputs: folders that the result depends on, beside the parameters and the code.
        save: writes the trained networks, given the validation metrics of the last epoch.
        item: which training of a matrix stage this is. It names its files, and it has no file of
            metrics: what the validation images gave stands beside the weights.

    Ctrl-C and SIGTERM end it after the step that is running, with everything saved.

    Of several processes each calls it, and that of rank 0 shows, logs and writes.

    Raises:
        TrainingError: the numbers went wrong; the last good resume point is kept.
        UserError: another process trains something else.
    """
    name, curve = _names(stage, item)
    keep_freed_memory()
    main = processes.is_main()
    if main:
        require_writable(MODELS, METRICS, curve.parent)
    device = choose_device()
    if not section.epochs:
        if main:
            final = learner.validate(load_split(PREPARED, "validation", device))
            save(final)
            record_untrained(stage, params, final, "0 epochs, the networks as they are", item=item)
        return
    print(
        f"{name}: {section.epochs} epochs on {processes.describe(describe_device(device))}", flush=True
    )
    if main:
        _warn_of_emulation(section, device)
    splits = {split: load_split(PREPARED, split, device) for split in ("train", "validation")}
    steps = loop.steps_per_epoch(len(splits["train"]), section.batch_size)
    key = _resume_key(stage, item, params, inputs)
    point = ResumePoint.of(name, key)
    with point.held() if main else nullcontext():
        _require_same_training(name, key)
        state = distributed.broadcast_from_rank0(
            lambda: TrainingState.of(point, recorded=_recorded_curve(stage, item, curve))
        )
        state.put_into(learner)
        distributed.broadcast_modules(learner.modules.values())
        state.say(name, epochs=section.epochs, steps=steps)
        with (
            stage_run(name, params.flat(), resumed=state.run_id) as mlflow_run,
            Progress(
                name, epochs=section.epochs, steps=steps, history=state.history, step=state.position.step
            ) as progress,
            deferred_signals(quietly=not main) as asked,
        ):
            keeper = Checkpointer(name, section, learner, point, state, mlflow_run)
            cores = SparedCores(device)
            for result in loop.fit(
                learner,
                train=splits["train"],
                validation=splits["validation"],
                epochs=section.epochs,
                batch_size=section.batch_size,
                schedule=schedule_of(section),
                augmentation=augmentation_of(params),
                normalisation=learner.normalisation,
                key=(params.seed, name),
                position=state.position,
            ):
                if (threads := cores.adapt()) is not None:
                    progress.note(f"{threads} of {cores.most} threads, for other work on this machine")
                if result is None:
                    progress.step()
                else:
                    keeper.epoch_done(result)
                    progress.epoch_done(state.history[-1], state.seconds)
                keeper.save_if_due(asked, epoch_ended=result is not None)
            if not main:
                return
            prefix = "validation_"
            final = {k.removeprefix(prefix): v for k, v in state.history[-1].items() if prefix in k}
            require_unchanged()  # before anything is written that DVC or a later training could take
            save(final)
            write_csv(curve, state.history)
            images = len(splits["train"]) * section.epochs
            write_times(name, state.seconds, images, fewest_threads=cores.fewest)
            if not item:
                write_json(METRICS / f"{stage}.json", {stage: final})  # DVC names it {stage}.{name}
            mlflow_run.log_metrics({"seconds": state.seconds})
            mlflow_run.log_artifact(curve)
            asked.leave()
        keeper.finish(curve)
    tidy(point.path.parent)


def _warn_of_emulation(section: TrainingSection, device: torch.device) -> None:
    """Say what bf16 costs where it is not computed but emulated; it trains all the same."""
    if section.precision == "bf16" and not computes_in_bf16(device):
        key = f"{type(section).__name__.lower()}.precision"
        print(
            f"warning: {key} is bf16, for which this {device.type.upper()} has no instructions: PyTorch "
            f"emulates it, which takes several times as long as fp32; set {key} to fp32",
            file=sys.stderr,
            flush=True,
        )


# what dvc.yaml draws of each training: an imported one has no points, but its columns must be there
OF_POLICY = ("accuracy", "reward", "blocks")
OF_VALIDATION = ("accuracy", "reward", "blocks_mean", "active_blocks")
POLICY_COLUMNS = (
    "epoch",
    *(f"train_{name}" for name in OF_POLICY),
    *(f"validation_{name}" for name in OF_VALIDATION),
)
CLASSIFICATION_COLUMNS = ("epoch", "train_accuracy", "validation_accuracy")
COLUMNS = {
    "pretrain": CLASSIFICATION_COLUMNS,
    "sole": CLASSIFICATION_COLUMNS,
    "static": CLASSIFICATION_COLUMNS,
    "curriculum": POLICY_COLUMNS,
    "finetune": POLICY_COLUMNS,
}


def record_import(stage: str, params: Params, path: Path, *, item: str = "") -> None:
    """The small files and the run of a stage that imports."""
    record_untrained(stage, params, {"imported": 1}, f"imported {path}", item=item)


def record_untrained(stage: str, params: Params, metrics: Metrics, what: str, *, item: str = "") -> None:
    """The small files and the run of a stage that trains nothing: there is no curve and no time."""
    name, curve = _names(stage, item)
    with stage_run(name, params.flat()):
        write_csv(curve, [], columns=COLUMNS[stage])
        write_json(METRICS / "times" / f"{name}.json", {"seconds": None, "images_per_second": None})
        if not item:
            write_json(METRICS / f"{stage}.json", {stage: metrics})
        print(f"{name}: {what}")


def _names(stage: str, item: str) -> tuple[str, Path]:
    """What a training is called, and where its learning curve lies."""
    if item:
        return f"{stage}-{item}", PLOTS / stage / f"{item}.csv"
    return stage, PLOTS / f"{stage}.csv"


def _resume_key(stage: str, item: str, params: Params, inputs: Sequence[Path]) -> str:
    files = [path for folder in inputs for path in folder.glob("*.json")]  # they hold digests
    return key_of(
        format=FORMAT,
        stage=stage,
        item=item,
        params=params_of(stage, params),
        inputs=digest_of_files(files),
        code=digest_of_files(code_of(stage)),
        torch=torch.__version__,
        numpy=np.__version__,
        device=str(choose_device()),
    )


def _require_same_training(name: str, key: str) -> None:
    """See that all processes have the parameters, data, code and libraries of process 0.

    Raises:
        UserError: this one has others.
    """
    if distributed.broadcast_from_rank0(lambda: key) != key:
        raise UserError(
            f"{name}: this process has other parameters, data, code, PyTorch, NumPy or kind of device "
            "than process 0; give every machine the same commit, params.yaml, `dvc pull` and .venv"
        )


def _recorded_curve(stage: str, item: str, curve: Path) -> str | None:
    """The MD5 of this training's learning curve in dvc.lock, if DVC has recorded one."""
    name = f"{stage}@{item}" if item else stage
    try:
        entry = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"][name]
        return next(out["md5"] for out in entry["outs"] if out["path"] == curve.as_posix())
    except (OSError, yaml.YAMLError, TypeError, KeyError, StopIteration):
        return None
