"""The faults: a signal at a moment, a write that goes wrong, an MLflow server that dies."""

import contextlib
import csv
import os
import random
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from chaos import checks
from chaos.sandbox import (
    FIRST_EPOCH,
    PLACES,
    STORE,
    TRAINER,
    Command,
    Sandbox,
    Training,
    forget,
)
from chaos.write_faults import failed_write, preloaded

TRIES = 6  # a fault that comes after the end is tried again, earlier
EARLIER = 0.6
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
RESUMED = (": resuming after ", "; its result is taken")
HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault in a training.

    Attributes:
        name: as `--only` takes it ("kill 17").
        fault: SIGKILL, SIGTERM or SIGINT at a moment; KILL, ENOSPC or EIO in a write; server.
        target: trainer, dvc, or group (both of them, as from a terminal); of a write its process.
        share: which moment of the run's phase, or which of the writes, [0, 1).
        in_training: the moment comes after the first epoch, not before it.
        place: of the write.
        later: all later writes fail too, as on a full disk.
    """

    name: str
    training: Training
    fault: str
    target: str
    share: float
    in_training: bool = True
    place: str = ""
    later: bool = False

    @property
    def nth(self) -> int:
        """The number of the write, from 1."""
        return 1 + int(self.share * self.training.writes[self.target, self.place])


@dataclass(kw_only=True)
class Outcome:
    """The result of a case.

    Attributes:
        description: what was done.
        resumed: the next `dvc repro` went on from a resume point or took a result.
        repaired: what tools.repair_dvc had to put aside before it.
        violations: what did not hold; empty is good.
    """

    name: str
    stage: str
    description: str = "nothing"
    resumed: bool = False
    repaired: str = ""
    violations: list[str] = field(default_factory=list)


def _writes(training: Training, *, store: bool = False) -> list[tuple[str, str]]:
    """Where trainer and DVC write: pairs of process and place that were seen in the reference."""
    places = [(process, place) for process, names in PLACES.items() for place in names]
    return [p for p in places if training.writes[p] and (store or p[1] != STORE)]


def draw_kill(number: int, seed: int, sandbox: Sandbox) -> Case:
    """Trainings and signals take turns, the rest is random; half of the SIGKILLs hit a write."""
    rng = random.Random(f"{seed} kill {number}")
    turn, index = divmod(number - 1, len(sandbox.trainings))
    training, fault = sandbox.trainings[index], SIGNALS[turn % len(SIGNALS)]
    # DVC ignores SIGINT while a stage runs: Ctrl-C reaches the whole group, and the stage ends
    targets = ("trainer", "group") if fault == "SIGINT" else ("trainer", "group", "dvc")
    case = Case(
        name=f"kill {number}", training=training, fault=fault, target=rng.choice(targets),
        share=rng.random(), in_training=rng.random() < 0.75,
    )  # fmt: skip
    if fault != "SIGKILL" or rng.random() < 0.5:
        return case
    target, place = rng.choice(_writes(training))
    return replace(case, fault="KILL", target=target, place=place)


def draw_write(number: int, seed: int, sandbox: Sandbox) -> Case:
    """Places and errors take turns, the rest is random."""
    rng = random.Random(f"{seed} write {number}")
    training = rng.choice(sandbox.trainings)
    places = _writes(training, store=True)
    turn, index = divmod(number - 1, len(places))
    target, place = places[index]
    return Case(
        name=f"write {number}", training=training, fault=("ENOSPC", "EIO")[(turn + index) % 2],
        target=target, place=place, share=rng.random(), later=rng.random() < 0.5,
    )  # fmt: skip


def draw_server(number: int, seed: int, sandbox: Sandbox) -> Case:
    """A training whose curves the experiment's run has, and a moment of it."""
    rng = random.Random(f"{seed} server {number}")
    training = rng.choice([t for t in sandbox.trainings if "@" not in t.name])
    name = f"server {number}"
    return Case(name=name, training=training, fault="server", target="server", share=rng.random())


def run(case: Case, sandbox: Sandbox) -> Outcome:
    """Let the fault happen in a fresh copy, and check what a plain `dvc repro` makes of it."""
    outcome = Outcome(name=case.name, stage=case.training.name)
    for _ in range(TRIES):
        with sandbox.copy(case.name) as folder:
            forget(folder, case.training)
            if case.fault == "server":
                kill_server(case, sandbox, folder, outcome)
                return outcome
            if (break_write if case.place else send_signal)(case, sandbox, folder, outcome):
                recover(case, sandbox, folder, outcome)
                return outcome
        case = replace(case, share=case.share * EARLIER)
    outcome.violations.append(f"nothing was hit in {TRIES} tries: {case}")
    return outcome


def recover(case: Case, sandbox: Sandbox, folder: Path, outcome: Outcome) -> None:
    """Do what `make repro` does, and run all checks after it."""
    training = case.training
    # an orphaned trainer may still write, so what the next one finds is a matter of time
    points = [] if any(checks.processes_in(folder)) else training.resume_points(folder)
    must_resume = any(not point.name.endswith(".fresh.pt") for point in points)
    status, output = sandbox.run(folder, "dvc", "repro")
    if status:  # DVC may have been killed while it wrote files in place: `make repro` repairs them
        _, outcome.repaired = sandbox.run(folder, sys.executable, "-m", "tools.repair_dvc")
        status, output = sandbox.run(folder, "dvc", "repro") if outcome.repaired else (status, output)
    outcome.resumed = any(text in output for text in RESUMED)
    if status:
        outcome.violations.append(f"dvc repro: exit status {status}: {output[-1500:]}")
    if must_resume and not outcome.resumed and f"Running stage '{training.name}'" in output:
        outcome.violations.append("the training started over beside its resume point")
    # completes a run that MLflow could not be told of, and ends the experiment's, whose last stage, the
    # report, is not in these copies
    outcome.violations += sync(sandbox, folder)
    outcome.violations += checks.all_violations(
        folder, outs=sandbox.outs, store=folder / STORE, environment=sandbox.environment()
    )


def send_signal(case: Case, sandbox: Sandbox, folder: Path, outcome: Outcome) -> bool:
    """Send the signal at its moment; False when all had ended by then."""
    running = Command(sandbox, folder, "dvc", "repro")
    text, seconds = (FIRST_EPOCH if case.in_training else ""), case.training.seconds[case.in_training]
    running.sleep_until(text, case.share * seconds)
    trainer = running.trainer()
    number = signal.Signals[case.fault]
    with contextlib.suppress(ProcessLookupError, psutil.Error):
        if case.target == "group":
            os.killpg(running.process.pid, number)
        elif case.target == "trainer" and trainer is not None:
            trainer.send_signal(number)
        else:
            running.process.send_signal(number)
    phase = "in the training" if case.in_training else "before the first epoch"
    alone = "" if trainer else ", when no stage ran"
    outcome.description = f"{case.fault} to {case.target} {phase}{alone}"
    return running.wait()[0] != 0


def break_write(case: Case, sandbox: Sandbox, folder: Path, outcome: Outcome) -> bool:
    """Let a write fail, or a process be killed in the middle of it; False when it never came."""
    shim = preloaded(
        sandbox.library, folder, [case.place], process=case.target, nth=case.nth, fault=case.fault,
        later=case.later,
    )  # fmt: skip
    status, output = sandbox.run(folder, "dvc", "repro", **shim)
    call = failed_write(folder)
    later = " and all later" if case.later else ""
    outcome.description = f"{case.fault} in write {case.nth}{later}: {call}; exit status {status}"
    if case.fault == "KILL":
        return bool(call and status)
    if case.target == TRAINER:
        outcome.violations = unclear_messages(output, status, case.place)
    if call and status == 0:
        outcome.violations += checks.different_outs(folder, sandbox.outs)
    return bool(call)


def unclear_messages(output: str, status: int, place: str) -> list[str]:
    """What a stage's messages lack: one line with the file and a remedy, and no traceback."""
    if "Traceback (most recent call last)" in output:
        return [f"a traceback: {output[-1500:]}"]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if status and len(errors) != 1:
        return [f"{len(errors)} lines with an error instead of one: {output[-1500:]}"]
    if status and not (place in errors[0] and "; " in errors[0]):
        return [f"no file or no remedy: {errors[0]}"]
    if status == 0 and place == ".resume" and f"{place}/" not in output:
        return ["no message on a resume point that can't be written"]
    return []


def kill_server(case: Case, sandbox: Sandbox, folder: Path, outcome: Outcome) -> None:
    """Kill the server during the pipeline; when it is back, `tools.sync` must bring all curves."""
    shutil.copyfile(sandbox.folder / "dvc.yaml", folder / "dvc.yaml")  # all stages
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = int(free.getsockname()[1])
    uri = f"http://{HOST}:{port}"
    with running_server(sandbox, folder, port) as server:
        running = Command(sandbox, folder, "dvc", "repro", MLFLOW_TRACKING_URI=uri)
        running.sleep_until(FIRST_EPOCH, case.share * case.training.seconds[1])
        os.killpg(server.process.pid, signal.SIGKILL)
        status, output = running.wait()
    outcome.description = f"server killed; exit status {status}"
    if status:
        outcome.violations.append(f"dvc repro: exit status {status}: {output[-1500:]}")
    outcome.violations += checks.different_outs(folder, sandbox.outs, more=True)
    with running_server(sandbox, folder, port):
        outcome.violations += sync(sandbox, folder, MLFLOW_TRACKING_URI=uri)
        outcome.violations += missing_points(folder, uri)
    outcome.violations += checks.left_processes(folder)
    outcome.violations += checks.running_runs(folder / "server.db")


@contextlib.contextmanager
def running_server(sandbox: Sandbox, folder: Path, port: int) -> Iterator[Command]:
    """An MLflow server on a store beside the copy's own; at the end its session is killed."""
    server = Command(
        sandbox, folder, "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", (folder / "served").as_uri(),
    )  # fmt: skip
    try:
        for _ in range(1000):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2).close()
                break
            time.sleep(0.2)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def sync(sandbox: Sandbox, folder: Path, **variables: str) -> list[str]:
    status, output = sandbox.run(folder, sys.executable, "-m", "tools.sync", **variables)
    return [f"tools.sync: exit status {status}: {output[-1500:]}"] if status else []


def missing_points(folder: Path, uri: str) -> list[str]:
    """Points of the learning curves in plots/ that the experiment's run lacks."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, filter_string="tags.`blockdrop.role` = 'parent'")
    if len(runs) != 1:
        return [f"{len(runs)} runs of experiments instead of one"]
    violations = []
    for path in sorted((folder / "plots").glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in rows[0].keys() - {"epoch"} if "epoch" in rows[0] else ():
            history = client.get_metric_history(runs[0].info.run_id, f"{path.stem}/{name}")
            points = {(int(float(row["epoch"])), float(row[name])) for row in rows}
            missing = points - {(point.step, point.value) for point in history}
            if missing:
                violations.append(f"{len(missing)} points of {path.stem}/{name} are not in MLflow")
    return violations
