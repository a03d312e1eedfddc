"""What the stages share: the frame around each script, the training loop's I/O, small files."""

import csv
import json
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
from pipeline.data import DataError, load_split
from pipeline.params import NO_FILE, Curriculum, Finetune, Params, ParamsError, Pretrain
from pipeline.params import load as load_params
from pipeline.resume import ResumePoint, digest_of_files, key_of
from pipeline.runtime import choose_device, describe_device
from pipeline.tensors import Augmentation, Normalisation
from pipeline.tracking import stage_run

PREPARED = Path("data/prepared")
PRETRAINED = Path("models/pretrain")
POLICY = Path("models/curriculum")
FINETUNED = Path("models/finetune")
METRICS = Path("metrics")
PLOTS = Path("plots")

TrainingSection = Pretrain | Curriculum | Finetune
FINISHED_EARLY = 0.2  # share of the training at the end in which the schedule `step` takes x0.1


def run(main: Callable[[Params], None]) -> None:
    """Check params.yaml, then run a stage; what the user can mend ends in one line, not a traceback."""
    try:
        main(load_params())
    except (ParamsError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted JSON, so that equal results are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table; every row has the keys of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_times(stage: str, seconds: float, images: int) -> None:
    """How long a stage took, in a file of its own: it differs from run to run, results do not."""
    content = {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "device": describe_device(choose_device()),
    }
    write_json(METRICS / "times" / f"{stage}.json", content)


def imported(section: TrainingSection) -> Path | None:
    """The checkpoint to take instead of training, if one is named."""
    return None if section.checkpoint == NO_FILE else Path(section.checkpoint)


def normalisation_of(params: Params) -> Normalisation:
    """The input normalisation that params.yaml asks for."""
    return Normalisation(mean=params.resnet.mean, std=params.resnet.std)


def schedule_of(section: TrainingSection) -> Callable[[float], float]:
    """The learning rate's course over the training that params.yaml asks for."""
    if section.schedule == "constant":
        return training.constant
    if section.schedule == "step":  # the authors: at epoch 1600 of 2000
        return partial(training.step_down, at=1 - FINISHED_EARLY)
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
            normalisation=normalisation_of(params),
            key=(params.seed, stage),
            start_epoch=state["epoch"],
            on_step=bar.step,
        ):
            row = {"epoch": result.epoch + 1}
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


def _resume_key(
    stage: str, params: Params, section: TrainingSection, inputs: Sequence[Path]
) -> str:
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


