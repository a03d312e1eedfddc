"""What the three training stages share: the loop's input and output, and importing instead."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline import training
from pipeline.checkpoint import CheckpointError
from pipeline.data import load_split
from pipeline.errors import UserError
from pipeline.params import NO_FILE, Curriculum, Finetune, Params, Pretrain
from pipeline.resume import ResumePoint, digest_of_files, key_of
from pipeline.runtime import choose_device, describe_device
from pipeline.tensors import Augmentation
from pipeline.tracking.runs import stage_run
from pipeline.training import Metrics
from stages.common import METRICS, PLOTS, PREPARED, write_csv, write_json, write_times


class TrainingError(UserError):
    """A training's numbers went wrong; the message names stage, epoch and likely remedy."""


TrainingSection = Pretrain | Curriculum | Finetune
LAST_FIFTH = 0.8  # the schedule `step` takes x0.1 from here; the authors: epoch 1600 of 2000


def imported(section: TrainingSection) -> Path | None:
    """The checkpoint to take instead of training, if one is named."""
    return None if section.checkpoint == NO_FILE else Path(section.checkpoint)


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
) -> None:
    """Run a training with a progress bar, MLflow, learning curves and resume points.

    The last epoch is what is kept: to choose the best one would use the validation images twice.

    Args:
        inputs: folders that the result depends on, beside the parameters and the code.
        save: writes the trained networks, given the validation metrics of the last epoch.

    Raises:
        TrainingError: the numbers went wrong; the resume point of the last good epoch is kept.
    """
    device = choose_device()
    print(f"{stage}: {section.epochs} epochs on {describe_device(device)}", flush=True)
    splits = {name: load_split(PREPARED, name, device) for name in ("train", "validation")}
    point = ResumePoint.of(stage, _resume_key(stage, params, section, inputs))
    with point.held():
        state = point.load() or {"epoch": 0, "history": [], "seconds": 0.0, "run_id": None}
        if state["epoch"]:
            print(f"{stage}: resuming after epoch {state['epoch']} of {section.epochs}", flush=True)
            _restore(learner, state)
        with stage_run(stage, params.flat(), resumed=state["run_id"]) as mlflow_run:
            bar = _EpochBar(stage, section.epochs)
            started = time.monotonic() - state["seconds"]
            history: list[Metrics] = state["history"]
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
                key=(params.seed, stage),
                start_epoch=state["epoch"],
                on_step=bar.step,
            ):
                row = _row(result)
                _require_finite(stage, row)
                history.append(row)
                point.save(
                    {
                        "epoch": result.epoch + 1,
                        "history": history,
                        "seconds": time.monotonic() - started,
                        "run_id": mlflow_run.run_id or None,
                        "modules": {k: m.state_dict() for k, m in learner.modules.items()},
                        "optimizer": learner.optimizer.state_dict(),
                    }
                )
                mlflow_run.log_metrics(row, step=result.epoch + 1)
                bar.epoch_done(row)
            bar.close()
            seconds = time.monotonic() - started
            prefix = "validation_"
            final = {k.removeprefix(prefix): v for k, v in history[-1].items() if prefix in k}
            save(final)
            write_csv(PLOTS / f"{stage}.csv", history)
            write_times(stage, seconds, images=len(splits["train"]) * section.epochs)
            write_json(METRICS / f"{stage}.json", {stage: final})  # DVC names it {stage}.{name}
            mlflow_run.log_metrics({"seconds": seconds})
            mlflow_run.log_artifact(PLOTS / f"{stage}.csv")
        point.discard()


def record_import(stage: str, params: Params, path: Path) -> None:
    """The small files and the run of a stage that imports: there is no curve and no time."""
    with stage_run(stage, params.flat()):
        write_csv(PLOTS / f"{stage}.csv", [{"epoch": 0}])
        write_json(METRICS / "times" / f"{stage}.json", {"seconds": None, "images_per_second": None})
        write_json(METRICS / f"{stage}.json", {stage: {"imported": 1}})
        print(f"{stage}: imported {path}")


def _row(result: training.EpochResult) -> Metrics:
    row: Metrics = {"epoch": result.epoch + 1}
    row |= {f"train_{name}": value for name, value in result.train.items()}
    return row | {f"validation_{name}": value for name, value in result.validation.items()}


def _require_finite(stage: str, row: Metrics) -> None:
    wrong = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingError(
            f"{stage} diverged in epoch {row['epoch']:.0f} ({wrong[0]}); lower the learning rate of "
            f"{stage} in params.yaml, or set its precision to fp32"
        )


def _resume_key(stage: str, params: Params, section: TrainingSection, inputs: Sequence[Path]) -> str:
    code = [*Path("pipeline").glob("*.py"), *Path("stages").glob("*.py")]
    files = [path for folder in inputs for path in folder.glob("*.json")]  # they hold digests
    return key_of(
        stage=stage,
        section=section.model_dump(),
        augmentation=params.augmentation.model_dump(),
        resnet=params.resnet.model_dump(),
        policy_net=params.policy_net.model_dump() if stage != "pretrain" else None,
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


class _EpochBar:
    """A progress bar on a terminal; elsewhere one line for each epoch."""

    SHOWN = ("accuracy", "reward", "blocks_mean", "unique_policies", "learnt_blocks")

    def __init__(self, stage: str, epochs: int) -> None:
        self.stage = stage
        self.epochs = epochs
        self.terminal = sys.stderr.isatty() and "CI" not in os.environ
        self.bar = tqdm(desc=stage, disable=not self.terminal, unit="step", leave=False)

    def step(self, done: int, total: int) -> None:
        """One more step of an epoch is done."""
        self.bar.total = total
        self.bar.n = done
        self.bar.update(0)

    def epoch_done(self, row: Mapping[str, float]) -> None:
        """Say what the epoch gave on the validation images."""
        shown = [
            f"{name} {row[f'validation_{name}']:.4g}"
            for name in self.SHOWN
            if f"validation_{name}" in row
        ]
        line = f"{self.stage} epoch {int(row['epoch'])}/{self.epochs}: " + ", ".join(shown)
        self.bar.write(line) if self.terminal else print(line, flush=True)

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()
