"""What the three training stages share: the loop's input and output, and importing instead."""

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
from pipeline.data import load_split
from pipeline.params import NO_FILE, Curriculum, Finetune, Params, Pretrain
from pipeline.resume import ResumePoint, digest_of_files, key_of
from pipeline.runtime import choose_device, describe_device
from pipeline.tensors import Augmentation
from pipeline.tracking import stage_run
from stages.common import METRICS, PLOTS, PREPARED, write_csv, write_json, write_times

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


def train(
    stage: str,
    learner: training.Learner,
    params: Params,
    section: TrainingSection,
    inputs: Sequence[Path],
) -> dict[str, float]:
    """Run a training with a progress bar, MLflow, learning curves and resume points.

    Args:
        inputs: folders that the result depends on, beside the parameters and the code.

    Returns:
        The validation metrics of the last epoch. The last epoch is what is kept: choosing the best
        one would need the same validation images twice.
    """
    device = choose_device()
    print(f"{stage}: {section.epochs} epochs on {describe_device(device)}", flush=True)
    splits = {name: load_split(PREPARED, name, device) for name in ("train", "validation")}
    point = ResumePoint.of(stage, _resume_key(stage, params, section, inputs))
    state = point.load() or {"epoch": 0, "history": [], "seconds": 0.0, "run_id": None}
    if state["epoch"]:
        print(f"{stage}: resuming after epoch {state['epoch']} of {section.epochs}", flush=True)
        _restore(learner, state)
    with stage_run(stage, params.flat(), resumed=state["run_id"]) as mlflow_run:
        bar = _EpochBar(stage, section.epochs)
        started = time.monotonic() - state["seconds"]
        history: list[dict[str, float]] = state["history"]
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
            row: dict[str, float] = {"epoch": result.epoch + 1}
            row |= {f"train_{name}": value for name, value in result.train.items()}
            row |= {f"validation_{name}": value for name, value in result.validation.items()}
            history.append(row)
            bar.epoch_done(row)
            mlflow_run.log_metrics(row, step=result.epoch + 1)
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
        bar.close()
        seconds = time.monotonic() - started
        final = {k.removeprefix("validation_"): v for k, v in history[-1].items() if "valid" in k}
        mlflow_run.log_headline({f"{stage}.validation_{k}": v for k, v in final.items()})
        mlflow_run.log_headline({f"{stage}.seconds": seconds})
        write_csv(PLOTS / f"{stage}.csv", history)
        mlflow_run.log_artifact(PLOTS / f"{stage}.csv")
    write_times(stage, seconds, images=len(splits["train"]) * section.epochs)
    write_json(METRICS / f"{stage}.json", final)
    point.discard()
    return final


def write_untrained(stage: str) -> None:
    """The small files of a stage that imported its checkpoint: there is no curve and no time."""
    write_csv(PLOTS / f"{stage}.csv", [{"epoch": 0}])
    write_json(METRICS / "times" / f"{stage}.json", {"seconds": None, "images_per_second": None})
    write_json(METRICS / f"{stage}.json", {"imported": 1})


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
