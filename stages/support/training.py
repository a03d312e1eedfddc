"""What every training stage does: take a checkpoint or train, show and log it, write the results."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import yaml

from pipeline import distributed
from pipeline.config import NO_FILE, Params, PolicyNetParams, Pretrain, ResNetParams, section_name
from pipeline.data.dataset import load_split
from pipeline.data.metadata import load_classes
from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import (
    choose_device,
    computes_in_bf16,
    describe_device,
    keep_freed_memory,
    seed_everything,
)
from pipeline.inference.predict import evaluation_batch
from pipeline.infra import ranks
from pipeline.infra.errors import UserError
from pipeline.infra.ranks import is_main
from pipeline.infra.resume import ResumePoint, digest_of_files, key_of
from pipeline.infra.signals import deferred_signals
from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.out_of_distribution import UsualImages
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.tracking.runs import StageRun, stage_run
from pipeline.training import loop
from pipeline.training.classification import Classification
from pipeline.training.loop import Learner, Metrics
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
from stages.support.compatibility import load_resnet
from stages.support.inputs import code_of, inputs_of, params_of, require_unchanged
from stages.support.progress import Progress
from stages.support.recipes import (
    augmentation_of,
    normalisation_of,
    resnet_optimizer_of,
    schedule_of,
)
from stages.support.spared_cores import SparedCores
from stages.support.training_state import FORMAT, Checkpointer, TrainingSection, TrainingState

T = TypeVar("T")
MAX_USUAL_IMAGES = 5_000  # validation images that say what is usual

# What dvc.yaml draws of each training: without one there are no points, but the columns must be there.
CLASSIFICATION_COLUMNS = ("epoch", "train_accuracy", "validation_accuracy")
POLICY_COLUMNS = (
    "epoch", "train_accuracy", "train_reward", "train_blocks", "validation_accuracy",
    "validation_reward", "validation_blocks_mean", "validation_active_blocks",
)  # fmt: skip
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pretrain", "prune", "policy_pretrain", "sole", "static"), CLASSIFICATION_COLUMNS),
    **dict.fromkeys(("curriculum", "finetune"), POLICY_COLUMNS),
}


@dataclass(frozen=True)
class Outputs:
    """The files that a training stage writes; `item` tells the trainings of a matrix stage apart."""

    stage: str
    item: str

    @property
    def name(self) -> str:
        """How the training is called in messages, resume points and MLflow."""
        return f"{self.stage}-{self.item}" if self.item else self.stage

    @property
    def curve(self) -> Path:
        return PLOTS / self.stage / f"{self.item}.csv" if self.item else PLOTS / f"{self.stage}.csv"

    def write_checkpoint(self, networks: Checkpoint, metrics: Metrics) -> None:
        """Write the networks, with what the validation images gave beside them."""
        if networks.resnet is not None and networks.policy_net is not None:  # they are used together
            usual_images = _usual_images(networks.policy_net, networks.normalisation)
            networks = replace(networks, usual_images=usual_images)
        checkpoint.save(replace(networks, metrics=metrics), MODELS / self.stage / self.item)

    def write_metrics(self, metrics: Metrics) -> None:
        """Write the stage's file of metrics, which DVC names STAGE.METRIC; a matrix stage has none."""
        if not self.item:
            write_json(METRICS / f"{self.stage}.json", {self.stage: metrics})

    def write_untrained(self, params: Params, metrics: Metrics, reason: str) -> None:
        """Write the small files, and log the run, of a stage that trains nothing: no curve, no time."""
        with stage_run(self.name, params.flat()):
            write_csv(self.curve, [], columns=COLUMNS[self.stage])
            times = {"seconds": None, "images_per_second": None}
            write_json(METRICS / "times" / f"{self.name}.json", times)
            self.write_metrics(metrics)
            print(f"{self.name}: {reason}")


def run(
    stage: str,
    params: Params,
    section: TrainingSection,
    *,
    load: Callable[[Path], Checkpoint],
    build: Callable[[], tuple[Learner, Checkpoint]],
    item: str = "",
) -> None:
    """Write models/STAGE or models/STAGE/ITEM: take the checkpoint that params.yaml names, or train.

    With 0 epochs the networks are kept as `build` makes them, and validated once. Of several processes
    each calls this, and rank 0 alone prints, logs and writes.

    Args:
        section: the epochs, batches and schedule of the training.
        load: reads a checkpoint that is taken, and refuses one that does not fit.
        build: makes what learns, and the checkpoint of its networks, which the training moves.
        item: which training of a matrix stage this is.

    Raises:
        TrainingError: the numbers went wrong; the last good resume point is kept.
        UserError: the checkpoint does not fit, or another process trains something else.
    """
    outputs = Outputs(stage, item)
    imported = imported_path(getattr(params.checkpoints, stage))
    if imported is not None:
        networks = load(imported / item)
        if is_main():
            outputs.write_checkpoint(networks, {})
            outputs.write_untrained(params, {"imported": 1}, f"imported {imported / item}")
        return
    learner, networks = build()
    keep_freed_memory()
    if is_main():
        require_writable(MODELS, METRICS, outputs.curve.parent)
    if section.epochs:
        _train(outputs, params, section, learner, networks)
    elif is_main():
        metrics = learner.validate(load_split(PREPARED, "validation", choose_device()))
        outputs.write_checkpoint(networks, metrics)
        outputs.write_untrained(params, metrics, "0 epochs, the networks as they are")


def write_nothing(stage: str, params: Params, reason: str) -> None:
    """Write the files of a stage that has nothing to do, so that DVC finds them."""
    pass_on(stage, params, _full_network(stage, None, params), reason)


def pass_on(stage: str, params: Params, networks: Checkpoint, reason: str) -> None:
    """Write a stage's files with the networks of another one, to the byte."""
    if is_main():
        outputs = Outputs(stage, "")
        checkpoint.save(networks, MODELS / stage)
        outputs.write_untrained(params, {}, reason)


def before_training(stage: str, params: Params, compute: Callable[[], T]) -> T:
    """What a stage computes before its first step: once, also if the training is interrupted.

    It is kept beside the resume points; process 0 computes it for all.

    Args:
        compute: gives plain types and tensors.
    """

    def once() -> T:
        point = ResumePoint.of(f"{stage}-start", _resume_key(Outputs(stage, ""), params))
        with point.lock():
            stored = point.load()
            if stored is None:
                stored = {"computed": compute()}
                point.save(stored)
            return stored["computed"]

    return distributed.broadcast_from_rank0(once)


def run_full_network(
    stage: str,
    params: Params,
    network: ResNetParams | PolicyNetParams,
    section: Pretrain,
    *,
    depth: int,
    item: str = "",
) -> None:
    """Train a ResNet of some depth with every block, or take one.

    Args:
        network: that says its family and width.
        section: the recipe.
    """
    classes = load_classes(PREPARED)

    def load(path: Path) -> Checkpoint:
        resnet = load_resnet(path, params, classes, depth=depth, network=network)
        return _full_network(stage, resnet, params)

    def build() -> tuple[Classification, Checkpoint]:
        seed_everything(params.seed, stage, *([depth] if item else []))
        resnet = make_resnet(
            family=network.family, depth=depth, width=network.width, num_classes=len(classes)
        ).to(choose_device())
        learner = Classification(
            resnet,
            optimizer=resnet_optimizer_of(resnet, section),
            normalisation=normalisation_of(params),
            precision=section.precision,
            label_smoothing=section.label_smoothing,
        )
        return learner, _full_network(stage, resnet, params)

    run(stage, params, section, load=load, build=build, item=item)


def _full_network(stage: str, resnet: ResNet | None, params: Params) -> Checkpoint:
    return Checkpoint(
        stage=stage,
        resnet=resnet,
        policy_net=None,
        normalisation=normalisation_of(params),
        image_size=params.data.image_size,  # the size of data/prepared, on which the stages depend
        classes=load_classes(PREPARED),
        metrics={},
    )


def imported_path(setting: str) -> Path | None:
    """The checkpoint to take instead of training (of a matrix stage: their folder), if one is named.

    Raises:
        UserError: DVC would not notice a change of it.
    """
    if setting == NO_FILE:
        return None
    path = Path(setting)
    if path.is_dir():  # DVC sees a file that a stage names by itself, hidden or not
        require_seen(path, [file for file in path.rglob("*") if file.is_file()])
    return path


def _usual_images(policy_net: PolicyNet, normalisation: Normalisation) -> UsualImages:
    """What is usual, by the validation images."""
    device = choose_device()
    split = load_split(PREPARED, "validation", device)
    rows = torch.arange(min(len(split), MAX_USUAL_IMAGES), device=device)
    batches = split.batches(rows.split(evaluation_batch(split.image_size)))
    return UsualImages.of(policy_net.to(device), map(normalisation, batches))


def _train(
    outputs: Outputs, params: Params, section: TrainingSection, learner: Learner, networks: Checkpoint
) -> None:
    """Train from the last resume point on, and write the networks of the last epoch.

    Not those of the best epoch: to choose it would use the validation images twice.
    """
    device, name = choose_device(), outputs.name
    print(f"{name}: {section.epochs} epochs on {ranks.describe(describe_device(device))}", flush=True)
    if is_main():
        _warn_of_emulation(section, device)
    splits = {split: load_split(PREPARED, split, device) for split in ("train", "validation")}
    steps = loop.steps_per_epoch(len(splits["train"]), section.batch_size)
    key = _resume_key(outputs, params)
    _require_same_training(name, key)
    point = ResumePoint.of(name, key)
    with point.lock() if is_main() else nullcontext():
        state = distributed.broadcast_from_rank0(
            lambda: TrainingState.load(point, recorded_md5=_recorded_md5(outputs))
        )
        state.apply(learner)
        distributed.broadcast_modules(learner.modules.values())
        state.announce(name, epochs=section.epochs, steps=steps)
        with (
            stage_run(name, params.flat(), resumed=state.run_id) as mlflow_run,
            Progress(
                name, epochs=section.epochs, steps=steps, history=state.history, step=state.position.step
            ) as progress,
            deferred_signals(quiet=not is_main()) as stop,
        ):
            checkpointer = Checkpointer(name, section, learner, point, state, mlflow_run)
            cores = SparedCores(device)
            for result in _fit(splits, name, params, section, learner, state):
                if (threads := cores.adapt()) is not None:
                    progress.note(f"{threads} of {cores.most} threads, for other work on this machine")
                if result is None:
                    progress.step()
                else:
                    checkpointer.epoch_done(result)
                    progress.epoch_done(state.history[-1], state.seconds)
                checkpointer.save_if_due(stop, epoch_ended=result is not None)
            if not is_main():
                return
            images = len(splits["train"]) * section.epochs
            _write_results(outputs, networks, state, mlflow_run, images=images, fewest=cores.fewest)
            stop.raise_signal()
        checkpointer.finish()


def _fit(
    splits: dict[str, ImageSplit],
    name: str,
    params: Params,
    section: TrainingSection,
    learner: Learner,
    state: TrainingState,
) -> Iterator[loop.EpochResult | None]:
    """The training loop with what params.yaml says, from the state's position on."""
    return loop.fit(
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
    )


def _write_results(
    outputs: Outputs,
    networks: Checkpoint,
    state: TrainingState,
    mlflow_run: StageRun,
    *,
    images: int,
    fewest: int,
) -> None:
    """Write the trained networks, their curve, metrics and times."""
    require_unchanged()  # before anything is written that DVC or a later training could take
    prefix = "validation_"
    last_epoch = state.history[-1]
    metrics = {k.removeprefix(prefix): v for k, v in last_epoch.items() if k.startswith(prefix)}
    outputs.write_checkpoint(networks, metrics)
    write_csv(outputs.curve, state.history)
    write_times(outputs.name, state.seconds, images, fewest_threads=fewest)
    outputs.write_metrics(metrics)
    mlflow_run.log_metrics({"seconds": state.seconds})
    mlflow_run.log_artifact(outputs.curve)


def _warn_of_emulation(section: TrainingSection, device: torch.device) -> None:
    """Warn of bf16 on a device that has no instructions for it; the training runs all the same."""
    if section.precision == "bf16" and not computes_in_bf16(device):
        key = f"{section_name(section)}.precision"
        print(
            f"warning: {key} is bf16, for which this {device.type.upper()} has no instructions: PyTorch "
            f"emulates it, which takes several times as long as fp32; set {key} to fp32",
            file=sys.stderr,
            flush=True,
        )


def _resume_key(outputs: Outputs, params: Params) -> str:
    """A digest of all that the training's result depends on, by what dvc.yaml lists for its stage."""
    # data/prepared and checkpoints are known by their *.json, which hold the digests of the large files
    descriptions = [path for folder in inputs_of(outputs.stage) for path in folder.glob("*.json")]
    return key_of(
        format=FORMAT,
        stage=outputs.stage,
        item=outputs.item,
        params=params_of(outputs.stage, params),
        inputs=digest_of_files(descriptions),
        code=digest_of_files(code_of(outputs.stage)),
        torch=torch.__version__,
        numpy=np.__version__,
        device=str(choose_device()),
    )


def _require_same_training(name: str, key: str) -> None:
    """See that all processes have the parameters, data, code and libraries of process 0."""
    if distributed.broadcast_from_rank0(lambda: key) != key:
        raise UserError(
            f"{name}: this process has other parameters, data, code, PyTorch, NumPy or kind of device "
            "than process 0; give every machine the same commit, params.yaml, `dvc pull` and .venv"
        )


def _recorded_md5(outputs: Outputs) -> str | None:
    """The MD5 of this training's learning curve in dvc.lock, if DVC has recorded one."""
    stage = f"{outputs.stage}@{outputs.item}" if outputs.item else outputs.stage
    try:
        entry = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"][stage]
        return next(out["md5"] for out in entry["outs"] if out["path"] == outputs.curve.as_posix())
    except (OSError, yaml.YAMLError, TypeError, KeyError, StopIteration):
        return None
