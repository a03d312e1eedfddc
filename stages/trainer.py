"""What the training stages share: the loop's input and output, recipes, and importing instead."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from pipeline import training
from pipeline.checkpoint import Checkpoint, CheckpointError
from pipeline.data import load_classes, load_split
from pipeline.errors import UserError
from pipeline.params import NO_FILE, Curriculum, Finetune, Params, Pretrain
from pipeline.resnet import ResNet
from pipeline.resume import ResumePoint, digest_of_files, key_of
from pipeline.runtime import choose_device, describe_device
from pipeline.tensors import Augmentation, Normalisation
from pipeline.tracking.runs import stage_run
from pipeline.training import Classification, Metrics, make_optimizer
from stages.common import METRICS, PLOTS, PREPARED, write_csv, write_json, write_times


class TrainingError(UserError):
    """A training's numbers went wrong; the message names stage, epoch and likely remedy."""


TrainingSection = Pretrain | Curriculum | Finetune
LAST_FIFTH = 0.8  # the schedule `step` takes x0.1 from here; the authors: epoch 1600 of 2000


def imported(section: TrainingSection) -> Path | None:
    """The checkpoint to take instead of training, if one is named."""
    return None if section.checkpoint == NO_FILE else Path(section.checkpoint)


def normalisation_of(params: Params) -> Normalisation:
    """The input normalisation that params.yaml asks for."""
    return Normalisation(mean=params.resnet.mean, std=params.resnet.std)


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
    if section.schedule == "constant":
        return training.constant
    if section.schedule == "step":
        return partial(training.step_down, at=LAST_FIFTH)
    warmup = section.warmup_share if isinstance(section, Pretrain) else 0.0
    return partial(training.cosine, warmup=warmup)


def require_same(path: Path, what: str, found: object, wanted: object, remedy: str) -> None:
    """Compare a checkpoint that is imported with what the rest of the pipeline expects.

    Raises:
        CheckpointError: they differ.
    """
    if found != wanted:
        raise CheckpointError(f"{path}: its {what} is {found}, expected {wanted}; {remedy}")


def train(
    stage: str,
    learner: training.Learner,
    params: Params,
    section: TrainingSection,
    inputs: Sequence[Path],
    save: Callable[[Metrics], None],
    *,
    item: str = "",
) -> None:
    """Run a training with a progress bar, MLflow, learning curves and resume points.

    The last epoch is what is kept: to choose the best one would use the validation images twice.

    Args:
        inputs: folders that the result depends on, beside the parameters and the code.
        save: writes the trained networks, given the validation metrics of the last epoch.
        item: which training of a matrix stage this is. It names its files, and it has no file of
            metrics: what the validation images gave stands beside the weights.

    Raises:
        TrainingError: the numbers went wrong; the resume point of the last good epoch is kept.
    """
    name = f"{stage}-{item}" if item else stage
    curve = PLOTS / stage / f"{item}.csv" if item else PLOTS / f"{stage}.csv"
    device = choose_device()
    print(f"{name}: {section.epochs} epochs on {describe_device(device)}", flush=True)
    splits = {split: load_split(PREPARED, split, device) for split in ("train", "validation")}
    point = ResumePoint.of(name, _resume_key(stage, item, params, section, inputs))
    with point.held():
        state = point.load() or {"epoch": 0, "history": [], "seconds": 0.0, "run_id": None}
        if state["epoch"]:
            print(f"{name}: resuming after epoch {state['epoch']} of {section.epochs}", flush=True)
            _restore(learner, state)
        history: list[Metrics] = state["history"]
        steps = training.steps_per_epoch(len(splits["train"]), section.batch_size)
        with (
            stage_run(name, params.flat(), resumed=state["run_id"]) as mlflow_run,
            Progress(name, epochs=section.epochs, steps=steps, history=history) as progress,
        ):
            started = time.monotonic() - state["seconds"]
            for result in training.fit(
                learner,
                train=splits["train"],
                validation=splits["validation"],
                epochs=section.epochs,
                batch_size=section.batch_size,
                schedule=schedule_of(section),
                augmentation=Augmentation(
                    crop_padding=params.augmentation.crop_padding, flip=params.augmentation.flip
                ),
                normalisation=learner.normalisation,
                key=(params.seed, name),
                start_epoch=state["epoch"],
                on_step=progress.step,
            ):
                row = _row(result)
                _require_finite(name, section, row)
                history.append(row)
                seconds = time.monotonic() - started
                point.save(
                    {
                        "epoch": result.epoch + 1,
                        "history": history,
                        "seconds": seconds,
                        "run_id": mlflow_run.run_id or None,
                        "modules": {k: m.state_dict() for k, m in learner.modules.items()},
                        "optimizer": learner.optimizer.state_dict(),
                    }
                )
                mlflow_run.log_metrics(row, step=result.epoch + 1)
                progress.epoch_done(row, seconds)
            seconds = time.monotonic() - started
            prefix = "validation_"
            final = {k.removeprefix(prefix): v for k, v in history[-1].items() if prefix in k}
            save(final)
            write_csv(curve, history)
            write_times(name, seconds, images=len(splits["train"]) * section.epochs)
            if not item:
                write_json(METRICS / f"{stage}.json", {stage: final})  # DVC names it {stage}.{name}
            mlflow_run.log_metrics({"seconds": seconds})
            mlflow_run.log_artifact(curve)
        point.discard()


# what dvc.yaml draws of each training: an imported one has no points, but its columns must be there
OF_POLICY = ("accuracy", "greedy_reward", "blocks")
OF_VALIDATION = ("accuracy", "reward", "blocks_mean", "learnt_blocks")
POLICY_COLUMNS = (
    "epoch",
    *(f"train_{name}" for name in OF_POLICY),
    *(f"validation_{name}" for name in OF_VALIDATION),
)
COLUMNS = {
    "pretrain": ("epoch", "train_accuracy", "validation_accuracy"),
    "curriculum": POLICY_COLUMNS,
    "finetune": POLICY_COLUMNS,
}


def record_import(stage: str, params: Params, path: Path) -> None:
    """The small files and the run of a stage that imports: there is no curve and no time."""
    with stage_run(stage, params.flat()):
        write_csv(PLOTS / f"{stage}.csv", [], columns=COLUMNS[stage])
        write_json(METRICS / "times" / f"{stage}.json", {"seconds": None, "images_per_second": None})
        write_json(METRICS / f"{stage}.json", {stage: {"imported": 1}})
        print(f"{stage}: imported {path}")


def _row(result: training.EpochResult) -> Metrics:
    row: Metrics = {"epoch": result.epoch + 1}
    row |= {f"train_{name}": value for name, value in result.train.items()}
    return row | {f"validation_{name}": value for name, value in result.validation.items()}


def _require_finite(name: str, section: TrainingSection, row: Metrics) -> None:
    wrong = [f"{metric} is {value}" for metric, value in row.items() if not math.isfinite(value)]
    if wrong:
        where = type(section).__name__.lower()  # whose recipe it is: a matrix stage has none of its own
        raise TrainingError(
            f"{name} diverged in epoch {row['epoch']:.0f} ({wrong[0]}); lower the learning rate of "
            f"{where} in params.yaml, or set its precision to fp32"
        )


def _resume_key(
    stage: str, item: str, params: Params, section: TrainingSection, inputs: Sequence[Path]
) -> str:
    code = [*Path("pipeline").glob("*.py"), *Path("stages").glob("*.py")]
    files = [path for folder in inputs for path in folder.glob("*.json")]  # they hold digests
    return key_of(
        stage=stage,
        item=item,
        section=section.model_dump(),
        augmentation=params.augmentation.model_dump(),
        resnet=params.resnet.model_dump(),
        policy_net=params.policy_net.model_dump() if stage in ("curriculum", "finetune") else None,
        gamma=params.gamma if stage == "finetune" else None,
        seed=params.seed,
        inputs=digest_of_files(files),
        code=digest_of_files(code),
        torch=torch.__version__,
        device=str(choose_device()),
    )


def _restore(learner: training.Learner, state: Mapping[str, Any]) -> None:
    for name, module in learner.modules.items():
        module.load_state_dict(state["modules"][name])
    learner.optimizer.load_state_dict(state["optimizer"])


class Progress:
    """How far a training is: on a terminal one bar for all of it, elsewhere a line for each epoch.

    A log file beside a terminal (`dvc repro > log`) gets the lines too.

    Args:
        steps: of an epoch.
        history: the epochs that are done already, when a training is resumed.
    """

    IN_BAR = ("accuracy", "blocks_mean", "reward")  # what a narrow terminal has room for
    IN_LINE = ("accuracy", "reward", "blocks_mean", "unique_policies", "learnt_blocks")

    def __init__(self, name: str, *, epochs: int, steps: int, history: Sequence[Metrics]) -> None:
        self.name = name
        self.epochs = epochs
        terminal = _can_draw()
        self.lines = not (terminal and sys.stdout.isatty())
        self.bar = tqdm(
            desc=name,
            total=epochs * steps,
            initial=len(history) * steps,
            disable=not terminal,
            dynamic_ncols=True,
            smoothing=0,  # time left at the mean rate: validation between epochs is part of it
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )
        if history:
            self.bar.set_postfix_str(_shown(history[-1], self.IN_BAR))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()  # what comes next begins on a line of its own

    def step(self) -> None:
        """One more step is done."""
        self.bar.update()

    def epoch_done(self, row: Metrics, seconds: float) -> None:
        """Say what the epoch gave on the validation images, `seconds` after the training began."""
        self.bar.set_postfix_str(_shown(row, self.IN_BAR))
        if self.lines:
            done = int(row["epoch"])
            left = seconds / done * (self.epochs - done)
            print(
                f"{self.name} epoch {done}/{self.epochs}: {_shown(row, self.IN_LINE)}, "
                f"{tqdm.format_interval(seconds)} elapsed, {tqdm.format_interval(left)} left",
                flush=True,
            )


def _can_draw() -> bool:
    """Whether standard error is a terminal that says how wide it is (in a container it may not)."""
    if not sys.stderr.isatty() or "CI" in os.environ:
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _shown(row: Metrics, names: Sequence[str]) -> str:
    """Metrics of the validation images, those of `names` that there are."""
    return ", ".join(
        f"{name.removesuffix('_mean')} {row[f'validation_{name}']:.4g}"
        for name in names
        if f"validation_{name}" in row
    )
