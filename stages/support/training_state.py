"""How far a training is, and its resume points: what a kill loses is the work since the last save."""

import hashlib
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

from tqdm import tqdm

from pipeline import distributed
from pipeline.config import Curriculum, Finetune, Pretrain, section_name
from pipeline.device import choose_device, describe_device, random_states, set_random_states
from pipeline.inference import auto
from pipeline.infra.errors import UserError, explain
from pipeline.infra.ranks import is_main
from pipeline.infra.resume import ResumePoint
from pipeline.infra.signals import StopSignal
from pipeline.models.policies import collapse
from pipeline.models.policy_net import PolicyNet
from pipeline.tracking.runs import StageRun
from pipeline.training import loop
from pipeline.training.loop import Metrics
from stages.support.common import csv_text

TrainingSection = Pretrain | Curriculum | Finetune
FORMAT = 3  # of the states; it is part of a resume point's key, so that older ones are not found
SAVE_SECONDS = 30.0  # between two saves inside an epoch
MIN_TIMES_A_SAVE = 20  # a save waits that many times what the last one took: saving is 5 % of the time


class TrainingError(UserError):
    """A training's numbers went wrong; the message names stage, epoch and likely remedy."""


@dataclass(kw_only=True)
class TrainingState:
    """A training up to some step: what a resume point holds."""

    position: loop.Position = field(default_factory=loop.Position)  # the steps that are done
    history: list[Metrics] = field(default_factory=list)  # a row of metrics for each epoch that is done
    seconds: float = 0.0  # that it has taken so far, over all interruptions
    run_id: str | None = None  # of its MLflow run; None where it has none
    adopted: bool = False  # another process has finished this training, and the state is its last one
    # state dictionaries by the learner's names; `apply` uses them up, with the next two
    modules: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None  # its state dictionary
    random: dict[str, Any] | None = None  # the states of the global generators
    # those that won races (`auto.CHOICES`), by rank 0
    executors: dict[str, str] = field(default_factory=dict)
    device: str | None = None  # on which they did; on another one they race again

    @classmethod
    def load(cls, point: ResumePoint, *, recorded_md5: str | None) -> "TrainingState":
        """Read the state that a resume point holds, or the one at the start of a training.

        A training that was finished already is adopted: by a process that this one waited for, or
        before DVC could record it. Unless DVC has recorded it: DVC then restores it from its cache, and
        runs the stage only where the user wants it trained again.

        Args:
            recorded_md5: of the learning curve in dvc.lock; None where it has none of this training.
        """
        stored = point.load_finished()
        adopted = stored is not None and _curve_md5(stored["history"]) != recorded_md5
        if not adopted:
            stored = point.load()
        if stored is None:
            return cls()
        stored = stored | {"position": loop.Position(**stored["position"])}
        if adopted:
            stored["run_id"] = None  # the MLflow run is the other process's
        return cls(**stored, adopted=adopted)

    def apply(self, learner: loop.Learner) -> None:
        """Set networks, optimiser, global generators and the executors that won."""
        if self.modules is not None:
            for name, module in learner.modules.items():
                module.load_state_dict(self.modules[name])
        if self.optimizer is not None:
            learner.optimizer.load_state_dict(self.optimizer)
        if self.random is not None:
            set_random_states(self.random)
        if self.device == describe_device(choose_device()):
            auto.CHOICES.update(self.executors)
        self.modules = self.optimizer = self.random = None  # they take as much memory as the learner's

    def announce(self, name: str, *, epochs: int, steps: int) -> None:
        """Print where the training resumes; nothing for a new one."""
        if self.adopted:
            print(f"{name}: another process has trained exactly this; its result is taken", flush=True)
        elif self.position.epoch or self.position.step:
            step = f", step {self.position.step} of {steps}" if self.position.step else ""
            print(f"{name}: resuming after epoch {self.position.epoch} of {epochs}{step}", flush=True)
            device = describe_device(choose_device())
            if self.executors and self.device != device:
                print(
                    f"{name}: what is fastest was found out on {self.device}; on {device} executors "
                    "race again, and another one rounds otherwise",
                    flush=True,
                )

    def as_dict(self, learner: loop.Learner) -> dict[str, Any]:
        """What a resume point keeps: plain types and tensors."""
        return {
            "position": vars(self.position),
            "history": self.history,
            "seconds": self.seconds,
            "run_id": self.run_id,
            "modules": {name: module.state_dict() for name, module in learner.modules.items()},
            "optimizer": learner.optimizer.state_dict(),
            "random": random_states(),
            "executors": dict(auto.CHOICES),
            "device": describe_device(choose_device()),
        }


def _curve_md5(history: list[Metrics]) -> str:
    """The digest that DVC records of a learning curve."""
    return hashlib.md5(csv_text(history).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Checkpointer:
    """Saves a training's state: at each epoch's end, now and then inside one, and before it stops."""

    name: str
    section: TrainingSection
    learner: loop.Learner
    point: ResumePoint
    state: TrainingState
    run: StageRun

    def __post_init__(self) -> None:
        self.started_at = time.monotonic() - self.state.seconds
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0  # that the last save took
        self.is_saved = bool(self.state.history) and not self.state.adopted
        self.main = is_main()  # of several processes, the one that saves and prints
        self.warned: set[str] = set()
        for row in self.state.history:  # a resumed run passes over those that it has already
            self.run.log_metrics(row, step=int(row["epoch"]))

    def epoch_done(self, result: loop.EpochResult) -> None:
        """Add an epoch's metrics to the history and log them.

        Raises:
            TrainingError: they, or weights, are not finite.
        """
        self._require_finite(result)
        row: Metrics = {"epoch": result.epoch + 1}
        row |= {f"train_{name}": value for name, value in result.train.items()}
        row |= {f"validation_{name}": value for name, value in result.validation.items()}
        self.state.history.append(row)
        self.state.seconds = time.monotonic() - self.started_at
        self.run.log_metrics(row, step=result.epoch + 1)
        self._warn_of_collapse(result)

    def save_if_due(self, stop: StopSignal, *, epoch_ended: bool) -> None:
        """Save at an epoch's end and every SAVE_SECONDS, for a twentieth of the time at most.

        All processes of a training save, or stop, after the same step, whichever got the signal.

        Raises:
            KeyboardInterrupt, SystemExit: a process got a signal; the state is saved.
            TrainingError: metrics or weights are not finite; the last good state is kept.
        """
        seconds = time.monotonic() - self.saved_at
        is_last = epoch_ended and self.state.position.epoch == self.section.epochs
        is_due = (epoch_ended or seconds > SAVE_SECONDS) and (
            seconds > MIN_TIMES_A_SAVE * self.save_seconds
        )
        # rank 0 decides when to save, any rank whether to stop; later signals count after the next step
        save, number = distributed.all_reduce_max(
            [int(self.main and (is_due or is_last)), stop.number or 0]
        )
        if save or number:
            if not epoch_ended:  # else `epoch_done` has looked
                self._require_finite(None)
            if self.main:
                self._save()
        if number and self.main and self.is_saved:
            position = self.state.position
            step = f"epoch {position.epoch + 1}, step {position.step}"
            tqdm.write(f"{self.name}: saved at {step}; the same command goes on from there")
        StopSignal(number or None).raise_signal()

    def finish(self) -> None:
        """Leave the last state for processes that wait for this training; else they train themselves."""
        if not self.is_saved:
            return
        try:
            self.point.finish()
        except OSError as error:
            self._warn_once(f"{self.name}: {explain(error) or error}")

    def _save(self) -> None:
        begun = time.monotonic()
        self.state.seconds = begun - self.started_at
        self.state.run_id = self.run.run_id or None
        self.is_saved = True
        try:
            self.point.save(self.state.as_dict(self.learner))
        except OSError as error:
            self.is_saved = False
            self._warn_once(
                f"{self.name}: no resume point can be written ({explain(error) or error}); training "
                "goes on, but what is trained from here on would be lost if it were killed"
            )
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - begun

    def _require_finite(self, result: loop.EpochResult | None) -> None:
        try:
            loop.require_finite(self.learner, self.state.position, result)
        except loop.NotFiniteError as error:
            section = section_name(self.section)  # sole and static train by another's
            raise TrainingError(
                f"{self.name} diverged: {error}; lower the learning rate of {section} in params.yaml, "
                f"or set its precision to fp32 (the state before that is kept in {self.point.path})"
            ) from None

    def _warn_of_collapse(self, result: loop.EpochResult) -> None:
        metrics = result.validation
        if "policy_entropy" not in metrics:  # no policy is trained
            return
        num_blocks = cast(PolicyNet, self.learner.modules["policy_net"]).num_blocks
        if metrics["active_blocks"] < num_blocks:
            return
        # a policy whose entropy bonus falls to 0 is meant to settle
        settles = cast(Any, self.learner).objective.entropy_epochs is not None
        problem = collapse(
            keep_ratio=metrics["blocks_mean"] / num_blocks,
            entropy=None if settles else metrics["policy_entropy"],
        )
        if problem:
            epoch = f"by the end of epoch {result.epoch + 1}"
            self._warn_once(f"{self.name}: the policy has collapsed {epoch}: {problem}")
            self.run.set_tag("blockdrop.warning", problem)

    def _warn_once(self, message: str) -> None:
        kind = message.split("(")[0].split(" by the end")[0]
        if self.main and kind not in self.warned:
            self.warned.add(kind)
            tqdm.write(f"warning: {message}", file=sys.stderr)
