"""What may happen to a training: a kill, a write that fails, a server that dies; and what came of it."""

import contextlib
import csv
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from chaos import checks
from chaos.home import (
    DVC_PLACES,
    PHASES,
    PLACES,
    REPRO,
    STORE,
    TRAINERS,
    Home,
    Recovery,
    Repro,
    TimeUpError,
    Training,
    environment,
    failed_write,
    forget,
    fresh,
    preloaded,
    recover,
    repro,
    sync,
)

DRAWS = 6  # a moment after the end, or a write that never comes, is drawn again, earlier
EARLIER = 0.6
SHARES_OF_PHASES = (0.2, 0.55, 0.25)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
UNREACHABLE = "MLflow can't be reached"
HOST = "127.0.0.1"


@dataclass(kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        what: what was done, in a few words.
        kind: signal, error or server.
        target: who got it, or which place.
        resumed: the plain `dvc repro` afterwards did not start the training over.
        torn: files of DVC's own that `make repro` puts aside before it.
    """

    name: str
    stage: str
    what: str = "nothing could be done"
    kind: str = ""
    target: str = ""
    resumed: bool = False
    torn: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def take(self, found: Recovery) -> None:
        """Add what the plain `dvc repro` gave."""
        self.resumed, self.torn = found.resumed, found.torn
        self.losses += found.losses


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of them: `--only "kill 17"` names it."""

    number: int
    training: Training

    @property
    def name(self) -> str:
        """How it is called."""
        return f"{type(self).__name__.lower()} {self.number}"


# a write that goes wrong


@dataclass(frozen=True, kw_only=True)
class Write:
    """One of the calls that change files, and what happens in it.

    Attributes:
        of_dvc: DVC makes it, not the trainer.
        place: what it writes to.
        at: which of the writes there, as a share of all, [0, 1).
        fault: ENOSPC, EIO, or KILL: half of it is done, then the process gets SIGKILL.
        later: all later ones fail too, as on a full disk.
    """

    of_dvc: bool
    place: str
    at: float
    fault: str
    later: bool = False

    def nth(self, home: Home, training: Training) -> int:
        """Which one it is, from 1. DVC's were counted over all stages, and one runs here."""
        of_dvc = home.dvc_writes.get(self.place, 0) // len(home.entries)
        return 1 + int(self.at * (of_dvc if self.of_dvc else training.writes[self.place]))


def writers(home: Home, training: Training, *others: str) -> list[tuple[bool, str]]:
    """Whether DVC writes, and where, for all that was counted; by trainers in other places as well."""
    places = [(False, place) for place in (*PLACES, *others) if training.writes.get(place)]
    return places + [(True, place) for place in DVC_PLACES if home.dvc_writes.get(place)]


def break_write(home: Home, folder: Path, training: Training, write: Write) -> tuple[int, str]:
    """Exit status and output of a `dvc repro` in which a write goes wrong."""
    assert home.library is not None  # else none was counted, and none is drawn
    shim = preloaded(
        home.library, folder, [write.place], process=REPRO if write.of_dvc else TRAINERS,
        nth=write.nth(home, training), fault=write.fault, later=write.later,
    )  # fmt: skip
    with repro(folder, environment(home.folder) | shim, folder.with_name("repro.log")) as running:
        return running.wait(home.deadline), running.said


# kills


@dataclass(frozen=True, kw_only=True)
class Kill(Case):
    """A signal to someone at a moment, or SIGKILL in the middle of a write.

    Attributes:
        target: trainer, dvc, or group: both of them, as from a terminal.
        phase: which part of the stage's run it falls into, and
        share: where in that part, [0, 1).
        write: instead of a moment.
    """

    signal: signal.Signals
    target: str
    phase: str
    share: float
    write: Write | None = None

    def earlier(self) -> "Kill":
        """The same, sooner."""
        write = self.write and replace(self.write, at=self.write.at * EARLIER)
        return replace(self, share=self.share * EARLIER, write=write)


def draw_kill(number: int, seed: int, home: Home) -> Kill:
    """Stages and signals take turns, the rest is random."""
    chance = random.Random(f"{seed} kill {number}")
    training = home.trainings[(number - 1) % len(home.trainings)]
    sent = SIGNALS[(number - 1) // len(home.trainings) % len(SIGNALS)]
    # DVC ignores SIGINT while a stage runs: Ctrl-C is for everybody, and its child ends
    targets = ("trainer", "group") if sent == signal.SIGINT else ("trainer", "group", "dvc")
    kill = Kill(
        number=number,
        training=training,
        signal=sent,
        target=chance.choice(targets),
        phase=chance.choices(PHASES, SHARES_OF_PHASES)[0],
        share=chance.random(),
    )
    if sent != signal.SIGKILL or home.library is None or chance.random() < 0.5:
        return kill
    of_dvc, place = chance.choice(writers(home, training))
    write = Write(of_dvc=of_dvc, place=place, at=chance.random(), fault="KILL")
    return replace(kill, target="dvc" if of_dvc else "trainer", write=write)


def run_kill(kill: Kill, home: Home) -> Outcome:
    """Kill, and a plain `dvc repro` after it."""
    outcome = Outcome(name=kill.name, stage=kill.training.name, kind=kill.signal.name)
    for _ in range(DRAWS):
        with fresh(home, kill.name) as folder:
            forget(folder, kill.training)
            hit = _kill_in_write(kill, home, folder) if kill.write else _kill_at(kill, home, folder)
            if hit is not None:
                outcome.target, outcome.what = hit
                outcome.take(recover(home, folder, kill.training))
                return outcome
        kill = kill.earlier()
    outcome.losses = [f"nothing could be hit in {DRAWS} tries: {kill}"]
    return outcome


def _kill_at(kill: Kill, home: Home, folder: Path) -> tuple[str, str] | None:
    """Send the signal at its moment: to whom, and a description; None when all had ended by then."""
    seconds = kill.share * kill.training.seconds[kill.phase]
    with repro(folder, environment(home.folder), folder.with_name("repro.log")) as running:
        running.wait_for(kill.phase, seconds, home.deadline)
        phase, trainer = running.phase(), running.trainer()
        target = "dvc" if kill.target == "trainer" and trainer is None else kill.target
        _send(kill.signal, target, running, trainer)
        if running.wait(home.deadline) == 0:
            return None
    alone = "" if trainer else ", no trainer there"
    return target, f"{kill.signal.name} to {target} in {phase}{alone}"


def _send(number: signal.Signals, target: str, running: Repro, trainer: psutil.Process | None) -> None:
    with contextlib.suppress(ProcessLookupError, psutil.Error):
        if target == "group":
            os.killpg(running.process.pid, number)
        elif target == "trainer" and trainer is not None:
            trainer.send_signal(number)
        else:
            running.process.send_signal(number)


def _kill_in_write(kill: Kill, home: Home, folder: Path) -> tuple[str, str] | None:
    """Let trainer or DVC be killed in the middle of a write; None when it makes fewer of them."""
    assert kill.write is not None
    status, _ = break_write(home, folder, kill.training, kill.write)
    hit, nth = failed_write(folder), kill.write.nth(home, kill.training)
    return (kill.target, f"SIGKILL to {kill.target} in write {nth}: {hit}") if hit and status else None


# writes that fail


@dataclass(frozen=True, kw_only=True)
class Fault(Case):
    """A write that fails."""

    write: Write

    def earlier(self) -> "Fault":
        """The same, sooner."""
        return replace(self, write=replace(self.write, at=self.write.at * EARLIER))


def draw_fault(number: int, seed: int, home: Home) -> Fault:
    """Places and errors take turns, the rest is random."""
    chance = random.Random(f"{seed} fault {number}")
    training = chance.choice(home.trainings)
    places = writers(home, training, STORE)
    turn, place = divmod(number - 1, len(places))
    write = Write(
        of_dvc=places[place][0],
        place=places[place][1],
        at=chance.random(),
        fault=("ENOSPC", "EIO")[(turn + place) % 2],
        later=chance.random() < 0.5,
    )
    return Fault(number=number, training=training, write=write)


def run_fault(fault: Fault, home: Home) -> Outcome:
    """A `dvc repro` in which a write fails, and a plain one after it."""
    write = fault.write
    outcome = Outcome(name=fault.name, stage=fault.training.name, kind=write.fault, target=write.place)
    for _ in range(DRAWS):
        with fresh(home, fault.name) as folder:
            forget(folder, fault.training)
            status, said = break_write(home, folder, fault.training, fault.write)
            hit, nth = failed_write(folder), fault.write.nth(home, fault.training)
            if hit:
                more = " and all later" if write.later else ""
                outcome.what = f"{write.fault} in write {nth}{more}: {hit}; exit {status}"
                outcome.losses = [] if write.of_dvc else unclear(said, status, write.place)
                if status == 0:
                    outcome.losses += checks.different_outs(folder, home.outs)
                synced = write.place == STORE
                outcome.take(recover(home, folder, fault.training, with_sync=synced))
                return outcome
        fault = fault.earlier()
    outcome.losses = [f"no write failed in {DRAWS} tries: {fault}"]
    return outcome


def unclear(said: str, status: int, place: str) -> list[str]:
    """What a stage's words lack: no traceback; when it failed, one line with the file and a remedy."""
    lost = []
    if "Traceback (most recent call last)" in said:
        lost.append(f"a traceback: {said[-1500:]}")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if status and len(lines) != 1:
        lost.append(f"{len(lines)} lines with an error instead of one: {said[-1500:]}")
    elif status and not (place in lines[0] and "; " in lines[0]):
        lost.append(f"no file or no remedy: {lines[0]}")
    elif status == 0 and place == ".resume" and f"{place}/" not in said:
        lost.append("nothing was said of a resume point that can't be written")
    return lost


# servers that die


@dataclass(frozen=True, kw_only=True)
class Server(Case):
    """An MLflow server that is killed while a training logs to it, at a share of the training."""

    share: float


def draw_server(number: int, seed: int, home: Home) -> Server:
    """One of the trainings whose curves the parent run has."""
    chance = random.Random(f"{seed} server {number}")
    logged = [training for training in home.trainings if training.kind == training.name]
    return Server(number=number, training=chance.choice(logged), share=chance.random())


def run_server(death: Server, home: Home) -> Outcome:
    """The whole pipeline while its server dies; then it is back, and `tools.sync` brings all curves."""
    outcome = Outcome(name=death.name, stage=death.training.name, kind="server", target="server")
    with fresh(home, death.name) as folder:
        forget(folder, death.training)
        shutil.copyfile(home.folder / "dvc.yaml", folder / "dvc.yaml")
        port = free_port()
        uri = f"http://{HOST}:{port}"
        variables = environment(home.folder) | {"MLFLOW_TRACKING_URI": uri}
        with served(folder, port, home) as server:
            outcome.what, outcome.losses = _kill_server(server, death, home, folder, variables)
        with served(folder, port, home):
            outcome.losses += sync(folder, variables)
            outcome.losses += missing_points(folder, uri)
        outcome.losses += checks.left_processes(folder)
        for store in ("server.db", STORE):
            outcome.losses += checks.running_runs(folder / store)
    return outcome


def _kill_server(
    server: "subprocess.Popen[bytes]", death: Server, home: Home, folder: Path, variables: dict[str, str]
) -> tuple[str, list[str]]:
    """What was done, and what is lost before the server is back."""
    with repro(folder, variables, folder.with_name("repro.log")) as running:
        seconds = death.share * death.training.seconds["training"]
        running.wait_for("training", seconds, home.deadline)
        phase = running.phase()
        os.killpg(server.pid, signal.SIGKILL)
        status = running.wait(home.deadline)
    lost = [f"dvc repro: exit status {status}: {running.tail}"] if status else []
    lost += checks.different_outs(folder, home.outs, others=True)
    return f"server killed in {phase}; exit {status}", lost + said_once(running.said)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def served(folder: Path, port: int, home: Home) -> "Iterator[subprocess.Popen[bytes]]":
    """An MLflow server on a sqlite store beside a copy's own, ended with all its workers."""
    store, artifacts = f"sqlite:///{folder / 'server.db'}", (folder / "served").as_uri()
    words = ["--backend-store-uri", store, "--artifacts-destination", artifacts, "--workers", "1"]
    with folder.with_name("server.log").open("ab") as log:
        server = subprocess.Popen(
            ["mlflow", "server", "--host", HOST, "--port", str(port), *words],
            cwd=folder.parent, env=environment(home.folder), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _wait_for(f"http://{HOST}:{port}/health", home.deadline)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(address: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.2)
    raise TimeUpError


def said_once(said: str) -> list[str]:
    """No stage says more than once that the server is away, and one says it."""
    parts = re.split(r"Running stage '(.+)':", said)
    counts = {name: text.count(UNREACHABLE) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    if not sum(counts.values()):
        return ["nobody said that MLflow is away"]
    return [f"{name} said {n} times that MLflow is away" for name, n in counts.items() if n > 1]


def missing_points(folder: Path, uri: str) -> list[str]:
    """Points of learning curves in plots/ that the experiment's run lacks."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    ids = [found.experiment_id for found in client.search_experiments()]
    parents = client.search_runs(ids, filter_string="tags.`blockdrop.role` = 'parent'")
    if len(parents) != 1:
        return [f"{len(parents)} runs of experiments instead of one"]
    lost = []
    for path in sorted((folder / "plots").glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in rows[0].keys() - {"epoch"} if "epoch" in rows[0] else ():
            history = client.get_metric_history(parents[0].info.run_id, f"{path.stem}/{name}")
            wanted = {(int(float(row["epoch"])), float(row[name])) for row in rows}
            left = wanted - {(point.step, point.value) for point in history}
            lost += [f"{len(left)} points of {path.stem}/{name} are not in MLflow"] if left else []
    return lost
