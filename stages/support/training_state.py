"""How far a training is, and where that is kept, so that nothing is lost when it is killed."""

import hashlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from pipeline import distributed
from pipeline.config import Curriculum, Finetune, Pretrain
from pipeline.device import choose_device, describe_device, random_states, set_random_states
from pipeline.inference import auto
from pipeline.infra.errors import UserError, explain
from pipeline.infra.processes import is_main
from pipeline.infra.resume import ResumePoint
from pipeline.infra.signals import StopSignal
from pipeline.models.policies import collapse
from pipeline.models.policy_net import PolicyNet
from pipeline.tracking.runs import StageRun
from pipeline.training import loop
from pipeline.training.loop import Metrics

TrainingSection = Pretrain | Curriculum | Finetune
FORMAT = 2  # of the states; others are not found
SAVE_SECONDS = 30.0  # between resume points inside an epoch
SAVE_SHARE = 20  # a resume point is no sooner than that many times what the last one took


class TrainingError(UserError):
    """A training's numbers went wrong; the message names stage, epoch and likely remedy."""


@dataclass(kw_only=True)
class TrainingState:
    """A training as far as it is: what a resume point holds.

    Attributes:
        position: the steps that are done.
        history: a row of metrics for each epoch that is done.
        seconds: that it took so far, in all processes that worked at it.
        run_id: its run in MLflow; None where it has none.
        adopted: it is the result of a training that is over, of this process or of another one.
        modules: state dictionaries by the learner's names; these three None at the start, and once used.
        optimizer: the optimiser's state dictionary.
        random: the global generators' states.
        executors: which have won races (`inference.CHOICES`); of several processes, those of process 0.
        device: on which; elsewhere they race anew.
    """

    position: loop.Position = field(default_factory=loop.Position)
    history: list[Metrics] = field(default_factory=list)
    seconds: float = 0.0
    run_id: str | None = None
    adopted: bool = False
    modules: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    executors: dict[str, str] = field(default_factory=dict)
    device: str | None = None

    @classmethod
    def of(cls, point: ResumePoint, *, recorded: str | None) -> "TrainingState":
        """The training as another process left it, or at its start.

        One that was finished, by a process that this one waited for or before DVC could record it, is
        taken as it is. One that DVC has recorded is trained anew: to ask for it is to want that.

        Args:
            recorded: MD5 of the learning curve in dvc.lock; None where it has none of this training.
        """
        finished = point.load_finished()
        adopted = finished is not None and finished["curve_md5"] != recorded
        stored = finished if adopted else point.load()
        if stored is None:
            return cls()
        return cls(
            position=loop.Position(**stored["position"]),
            history=stored["history"],
            seconds=stored["seconds"],
            run_id=stored["run_id"],
            adopted=adopted,
            modules=stored["modules"],
            optimizer=stored.get("optimizer"),
            random=stored.get("random"),
            executors=stored.get("executors", {}),
            device=stored.get("device"),
        )

    def put_into(self, learner: loop.Learner) -> None:
        """Set networks, optimiser and global generators."""
        if self.modules is not None:
            for name, module in learner.modules.items():
                module.load_state_dict(self.modules[name])
        if self.optimizer is not None:
            learner.optimizer.load_state_dict(self.optimizer)
        if self.random is not None:
            set_random_states(self.random)
        if self.device == describe_device(choose_device()):
            auto.CHOICES.update(self.executors)
        self.modules = self.optimizer = self.random = None  # twice the memory otherwise

    def say(self, name: str, *, epochs: int, steps: int) -> None:
        """One line on where it goes on."""
        if self.adopted:
            print(f"{name}: another process has trained exactly this; its result is taken", flush=True)
        elif self.position.epoch or self.position.step:
            step = f", step {self.position.step} of {steps}" if self.position.step else ""
            print(f"{name}: resuming after epoch {self.position.epoch} of {epochs}{step}", flush=True)
            here = describe_device(choose_device())
            if self.executors and self.device != here:
                print(
                    f"{name}: what is fastest was found out on {self.device}; on {here} executors race "
                    "anew, and another one rounds otherwise",
                    flush=True,
                )

    def as_dict(self, learner: loop.Learner, *, finished: bool = False) -> dict[str, Any]:
        """What a resume point keeps, or when it is finished what others take."""
        state = {
            "position": vars(self.position),
            "history": self.history,
            "seconds": self.seconds,
            "run_id": None if finished else self.run_id,
            "modules": {name: module.state_dict() for name, module in learner.modules.items()},
        }
        if not finished:
            state |= {"optimizer": learner.optimizer.state_dict(), "random": random_states()}
            device = describe_device(choose_device())
            state |= {"executors": dict(auto.CHOICES), "device": device}
        return state


class Checkpointer:
    """Keeps a training's state: each epoch, now and then inside one, and when it is asked to stop."""

    def __init__(
        self,
        name: str,
        section: TrainingSection,
        learner: loop.Learner,
        point: ResumePoint,
        state: TrainingState,
        run: StageRun,
    ) -> None:
        self.name = name
        self.section = section
        self.learner = learner
        self.point = point
        self.state = state
        self.run = run
        self.started = time.monotonic() - state.seconds
        self.saved = time.monotonic()
        self.took = 0.0  # seconds, to save
        self.main = is_main()  # of several processes this one decides, writes and speaks
        self.warned: set[str] = set()
        for row in state.history:  # those that its run has already are passed over
            run.log_metrics(row, step=int(row["epoch"]))

    def epoch_done(self, result: loop.EpochResult) -> None:
        """Take up an epoch's metrics.

        Raises:
            TrainingError: they, or weights, are not finite.
        """
        self._require_finite(result)
        row: Metrics = {"epoch": result.epoch + 1}
        row |= {f"train_{name}": value for name, value in result.train.items()}
        row |= {f"validation_{name}": value for name, value in result.validation.items()}
        self.state.history.append(row)
        self.state.seconds = time.monotonic() - self.started
        self.run.log_metrics(row, step=result.epoch + 1)
        self._warn_of_collapse(result)

    def save_if_due(self, asked: StopSignal, *, epoch_ended: bool) -> None:
        """Save at an epoch's end and every `SAVE_SECONDS`, for a twentieth of the time at most.

        Of several processes all save, or stop, after the same step, whichever of them was asked.

        Raises:
            KeyboardInterrupt, SystemExit: the process was asked to stop; the state is saved.
            TrainingError: metrics or weights are not finite; the last good state is kept.
        """
        since = time.monotonic() - self.saved
        last = epoch_ended and self.state.position.epoch == self.section.epochs
        due = self.main and since > SAVE_SHARE * self.took and (epoch_ended or since > SAVE_SECONDS)
        decided = distributed.all_reduce_max([int(due or last), asked.signal or 0])
        told = StopSignal(decided[1] or None)  # what comes in from here on counts after the next step
        if any(decided):
            if not epoch_ended:  # else it was seen to
                self._require_finite(None)
            saved = self.main and self._save()
            if told.signal is not None and saved:
                position = self.state.position
                place = f"epoch {position.epoch + 1}, step {position.step}"
                tqdm.write(f"{self.name}: saved at {place}; the same command goes on from there")
        told.leave()

    def finish(self, curve: Path) -> None:
        """Leave the result for processes that wait for it. To fail here costs them their time alone."""
        content = self.state.as_dict(self.learner, finished=True)
        digest = hashlib.md5(curve.read_bytes(), usedforsecurity=False).hexdigest()
        try:
            self.point.finish(content | {"curve_md5": digest})
        except OSError as error:
            self._say_once(f"{self.name}: {explain(error) or error}")

    def _save(self) -> bool:
        """Whether it could be written."""
        begun = time.monotonic()
        self.state.seconds = begun - self.started
        self.state.run_id = self.run.run_id or None
        saved = True
        try:
            self.point.save(self.state.as_dict(self.learner))
        except OSError as error:
            saved = False
            self._say_once(
                f"{self.name}: no resume point can be written ({explain(error) or error}); training "
                "goes on, but what is trained from here on would be lost if it were killed"
            )
        self.saved = time.monotonic()
        self.took = self.saved - begun
        return saved

    def _require_finite(self, result: loop.EpochResult | None) -> None:
        try:
            loop.require_finite(self.learner, self.state.position, result)
        except loop.NotFiniteError as error:
            where = type(self.section).__name__.lower()  # a matrix stage has no recipe of its own
            raise TrainingError(
                f"{self.name} diverged: {error}; lower the learning rate of {where} in params.yaml, or "
                f"set its precision to fp32 (the state before that is kept in {self.point.path})"
            ) from None

    def _warn_of_collapse(self, result: loop.EpochResult) -> None:
        found = result.validation
        if "entropy" not in found:  # no policy is learnt
            return
        blocks = cast(PolicyNet, self.learner.modules["policy_net"]).num_blocks
        if found["active_blocks"] < blocks:
            return
        objective = cast(Any, self.learner).objective
        settles = objective.entropy_epochs is not None
        problem = collapse(
            keep_ratio=found["blocks_mean"] / blocks, entropy=None if settles else found["entropy"]
        )
        if problem:
            when = f"by the end of epoch {result.epoch + 1}"
            self._say_once(f"{self.name}: the policy has collapsed {when}: {problem}")
            self.run.set_tag("blockdrop.warning", problem)

    def _say_once(self, text: str) -> None:
        kind = text.split("(")[0].split(" by the end")[0]
        if self.main and kind not in self.warned:
            self.warned.add(kind)
            tqdm.write(f"warning: {text}", file=sys.stderr)
