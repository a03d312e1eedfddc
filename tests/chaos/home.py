"""Where chaos happens: a copy that nothing interrupts, fresh copies of it, `dvc repro` in them."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from chaos import checks
from tools import sandbox
from tools.repair_dvc import move_corrupted

# longer trainings than the tests have, so that most kills come into them
TINY: dict[str, dict[str, Any]] = sandbox.TINY | {
    "pretrain": {"epochs": 8},
    "curriculum": {"epochs": 6},
    "finetune": {"epochs": 5},
    "benchmark": sandbox.TINY["benchmark"] | {"batch_sizes": [4], "sole_depths": []},
    "static": {"rules": ["first"], "num_kept": [3]},
}
TRAININGS = ("pretrain", "curriculum", "finetune", "sole", "static")
FIRST = ("check", "prepare")  # what all of them need
SHIM = Path(__file__).with_name("faults.c")
TRAINERS = "-m stages."  # in the command line of every stage
REPRO = "dvc repro"  # in DVC's own
PLACES = ("models", "plots", "metrics", ".resume")  # where a training writes
STORE = "mlflow.db"
DVC_PLACES = (".dvc/cache", ".dvc/tmp", "dvc.lock")
PHASES = ("start", "training", "end")  # until the first epoch is done, the last one is, DVC has ended
PATIENCE = 180.0  # seconds for a `dvc repro` to end
STARTED = re.compile(r" epoch 1/\d+: ")
ENDED = re.compile(r" epoch (\d+)/\1: ")
RESUMED = re.compile(r": resuming after |; its result is taken")
# DVC 3.67 writes these files in place; killed in the middle of that, it can't read them any more and
# says so. To remove them loses nothing: the run cache has all of dvc.lock.


class TimeUpError(Exception):
    """The time that was given for everything is over."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training stage, as the run that nothing interrupted showed it.

    Attributes:
        name: DVC's (sole@8).
        command: its command line.
        seconds: how long each phase took.
        writes: calls that change files, by place.
    """

    name: str
    command: str
    seconds: Mapping[str, float]
    writes: Mapping[str, int]

    @property
    def kind(self) -> str:
        """The stage without its item."""
        return self.name.split("@")[0]

    def states(self, folder: Path) -> list[Path]:
        """Its resume points and results in a checkout."""
        return sorted((folder / ".resume").glob(f"{self.name.replace('@', '-')}-*.pt"))


@dataclass(kw_only=True)
class Home:
    """The copy that nothing interrupts, and what it left.

    Attributes:
        folder: holds that copy and all others.
        outs: digests of what the stages wrote.
        entries: what dvc.lock says.
        library: the compiled shim; None where there is no compiler.
        dvc_writes: calls of DVC that change files, by place, in the whole of its run.
        deadline: when the time for everything is over.
    """

    folder: Path
    trainings: Sequence[Training]
    outs: Mapping[str, str]
    entries: Mapping[str, Any]
    library: Path | None
    dvc_writes: Mapping[str, int]
    deadline: float


def environment(home: Path) -> dict[str, str]:
    """What commands see: DVC's own files are kept in the home folder, and lines come at once."""
    return sandbox.environment(tracking=True) | {
        "DVC_SITE_CACHE_DIR": str(home / "dvc-site"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes that nobody needs here
        "PYTHONUNBUFFERED": "1",
    }


# one `dvc repro`


class Repro:
    """A `dvc repro` in a session of its own, and what it and its stages say."""

    def __init__(self, folder: Path, variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["dvc", "repro"], cwd=folder, env=dict(variables), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """All of it until now."""
        return self.log.read_text(errors="replace")

    @property
    def tail(self) -> str:
        """What it said last."""
        return self.said[-1500:]

    def is_alive(self) -> bool:
        """Whether DVC still runs."""
        return self.process.poll() is None

    def trainer(self) -> psutil.Process | None:
        """The process of a stage, if there is one now."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if TRAINERS in " ".join(child.cmdline()):
                    return child
        return None

    def phase(self) -> str:
        """How far the training is."""
        said = self.said
        if ENDED.search(said):
            return "end"
        return "training" if STARTED.search(said) else "start"

    def wait_for(self, phase: str, seconds: float, deadline: float) -> None:
        """Return so many seconds after a phase began, or when DVC has ended."""
        while self.is_alive() and PHASES.index(self.phase()) < PHASES.index(phase):
            _nap(deadline)
        moment = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < moment:
            _nap(deadline)

    def wait(self, deadline: float) -> int:
        """Its exit status.

        Raises:
            TimeUpError: the time for everything is over.
            subprocess.TimeoutExpired: it hangs.
        """
        left = deadline - time.monotonic()
        try:
            return self.process.wait(max(0.0, min(PATIENCE, left)))
        except subprocess.TimeoutExpired:
            if left < PATIENCE:
                raise TimeUpError from None
            raise

    def end(self) -> None:
        """Kill whatever is left of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _nap(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeUpError
    time.sleep(0.005)


@contextlib.contextmanager
def repro(folder: Path, variables: Mapping[str, str], log: Path) -> Iterator[Repro]:
    """Start one. When something goes wrong here it is ended; else its orphans live on, to be seen."""
    started = Repro(folder, variables, log)
    try:
        yield started
    except BaseException:
        started.end()
        raise


# failing writes


def compile_shim(folder: Path) -> Path | None:
    """The library that makes writes fail, to be preloaded; None where it can't be made."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    words = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"{SHIM.name} can't be compiled: {done.stderr.strip()[:500]}")
        return None
    return library


def preloaded(
    library: Path,
    folder: Path,
    places: Sequence[str],
    *,
    process: str = "",
    nth: int = 0,
    fault: str = "",
    later: bool = False,
) -> dict[str, str]:
    """Variables that make a process count its writes under the places, or fail the n-th of them.

    Args:
        process: words in its command line.
        fault: ENOSPC, EIO, or KILL.
        later: all later ones fail too.
    """
    return {
        "LD_PRELOAD": str(library),
        "CHAOS_UNDER": ":".join(str(folder / place) for place in places),
        "CHAOS_PROCESS": process,
        "CHAOS_NTH": str(nth),
        "CHAOS_FAULT": fault,
        "CHAOS_LATER": str(int(later)),
        "CHAOS_REPORT": str(folder.with_name("writes")),
    }


def failed_write(folder: Path) -> str:
    """Which call on which file failed in a copy; nothing when none did."""
    report = folder.with_name("writes")
    for line in report.read_text().splitlines() if report.exists() else ():
        kind, call, path = line.split("\t")[:3]
        if kind == "hit":
            return f"{call} {Path(path).relative_to(folder)}"
    return ""


def count_writes(folder: Path) -> dict[str, dict[str, int]]:
    """Calls that change files, by command and place."""
    report = folder.with_name("writes")
    counts: dict[str, dict[str, int]] = {}
    for line in report.read_text().splitlines() if report.exists() else ():
        kind, place, number, command = line.split("\t")
        if kind == "count":
            name = re.sub(r"^\S*python\S* ", "python ", command.strip())  # as dvc.yaml has it
            places, known = counts.setdefault(name, {}), Path(place).relative_to(folder).as_posix()
            places[known] = places.get(known, 0) + int(number)
    return counts


# the run that nothing interrupts


def make_truth(home: Path, trainings: Sequence[str]) -> Path:
    """A copy of the repository with tiny parameters and no stages but some trainings.

    Args:
        trainings: these, and pretrain where they need it.
    """
    folder = home / "truth" / "copy"
    folder.mkdir(parents=True)
    sandbox.make(folder, changes=TINY)
    native = sandbox.ROOT / ".native"
    if native.is_dir():  # what is compiled already serves here too
        shutil.copytree(native, folder / ".native", dirs_exist_ok=True)
    (folder / ".dvc/config.local").write_text("[core]\n    check_update = false\n")
    shutil.copyfile(folder / "dvc.yaml", home / "dvc.yaml")
    whole = yaml.safe_load((folder / "dvc.yaml").read_text())
    stages = {name: whole["stages"][name] for name in (*FIRST, *needed(trainings))}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return folder


def needed(trainings: Sequence[str]) -> list[str]:
    """Some of the training stages, with those that they need."""
    wanted = set(trainings)
    for name, before in (("finetune", "curriculum"), ("curriculum", "pretrain"), ("static", "pretrain")):
        wanted |= {before} if name in wanted else set()
    return [name for name in TRAININGS if name in wanted]


def run_truth(home: Path, library: Path | None, trainings: Sequence[str], seconds: float) -> Home:
    """Run it to its end, and see what it takes and leaves.

    Args:
        seconds: for everything, from now on.

    Raises:
        SystemExit: it fails.
    """
    deadline = time.monotonic() + seconds
    folder = make_truth(home, trainings)
    places = (*PLACES, STORE, *DVC_PLACES)
    shim = preloaded(library, folder, places) if library else {}
    with repro(folder, environment(home) | shim, home / "truth" / "repro.log") as running:
        try:
            times = phases(watch(running, deadline))
        except TimeUpError:
            raise SystemExit("error: the run that nothing interrupts took all of the time") from None
    if running.process.returncode:
        raise SystemExit(f"error: dvc repro fails without any fault:\n{running.tail}")
    counts = count_writes(folder)
    entries = checks.lock_entries(folder)
    return Home(
        folder=home,
        trainings=[
            Training(
                name=name,
                command=entries[name]["cmd"],
                seconds=times[name],
                writes=counts.get(entries[name]["cmd"], {}),
            )
            for name in times
        ],
        outs=sandbox.digests(folder),
        entries=entries,
        library=library,
        dvc_writes=next((found for command, found in counts.items() if REPRO in command), {}),
        deadline=deadline,
    )


Mark = tuple[float, str, str]  # when which phase of which stage began


def watch(running: Repro, deadline: float) -> list[Mark]:
    """What its lines say on stages and phases, until it has ended."""
    marks: list[Mark] = []
    seen = 0
    while running.is_alive() or seen < len(running.said):
        for line in running.said[seen:].splitlines(keepends=True):
            if not line.endswith("\n") and running.is_alive():
                break  # more of it will come
            seen += len(line)
            stage, phase = _marked(line, marks[-1][1] if marks else "")
            if phase:
                marks.append((time.monotonic(), stage, phase))
        _nap(deadline)
    return [*marks, (time.monotonic(), "", "")]


def _marked(line: str, stage: str) -> tuple[str, str]:
    """The stage and the phase that begins with a line, if one does."""
    found = re.match(r"Running stage '(.+)':", line)
    if found:
        return found[1], "start"
    if ENDED.search(line):
        return stage, "end"
    return stage, "training" if STARTED.search(line) else ""


def phases(marks: Sequence[Mark]) -> dict[str, dict[str, float]]:
    """How long each phase of each training took; other stages have no epochs."""
    times: dict[str, dict[str, float]] = {}
    for (began, stage, phase), (ended, _, _) in itertools.pairwise(marks):
        times.setdefault(stage, {})[phase] = ended - began
    return {stage: found for stage, found in times.items() if found.keys() == set(PHASES)}


# a fresh copy for each case


@contextlib.contextmanager
def fresh(home: Home, name: str) -> Iterator[Path]:
    """A copy of the truth, with room for logs beside it; who works in it is ended when it is left."""
    folder = home.folder / name.replace(" ", "-") / "copy"
    shutil.rmtree(folder.parent, ignore_errors=True)  # of an earlier draw
    truth = home.folder / "truth" / "copy"
    shutil.copytree(truth, folder, symlinks=True)
    _move_store(folder / STORE, truth, folder)
    try:
        yield folder
    finally:
        for process in checks.processes_in(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _move_store(store: Path, old: Path, new: Path) -> None:
    """Artifacts go to the copy's folder, not to that of the truth."""
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            words = f"update {table} set {column} = replace({column}, ?, ?)"
            connection.execute(words, (str(old), str(new)))


def forget(folder: Path, training: Training) -> None:
    """Make DVC run a stage anew: no entry in dvc.lock, none in the run cache, no resume point."""
    path = folder / "dvc.lock"
    content = yaml.safe_load(path.read_text())
    del content["stages"][training.name]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    for entry in (folder / ".dvc/cache/runs").glob("*/*/*"):
        if yaml.safe_load(entry.read_text())["cmd"] == training.command:
            entry.unlink()
            entry.parent.rmdir()  # DVC stumbles over an empty one
    for state in training.states(folder):
        state.unlink()


@dataclass(kw_only=True)
class Recovery:
    """What a plain `dvc repro` gave.

    Attributes:
        resumed: it went on from what was there.
        torn: files of DVC's own that `make repro` puts aside before it.
    """

    resumed: bool = False
    torn: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)


def recover(home: Home, folder: Path, training: Training, *, with_sync: bool = False) -> Recovery:
    """A plain `dvc repro`, and all checks after it.

    Args:
        with_sync: and `tools.sync`, as `make repro` does it: MLflow may have been away to the end.
    """
    variables = environment(home.folder)
    found = Recovery(losses=checks.premature(folder, training.name, home.outs, variables))
    must = must_resume(folder, training)
    status, said = plain_repro(home, folder)
    if status:
        found.torn = [str(name) for name in move_corrupted(folder)]
        if found.torn:
            status, said = plain_repro(home, folder)
    found.resumed = RESUMED.search(said) is not None
    if status:
        found.losses.append(f"dvc repro: exit status {status}: {said[-1500:]}")
    if must and not found.resumed and f"Running stage '{training.name}'" in said:
        found.losses.append("the training started over, though there was something to go on from")
    if with_sync:
        found.losses += sync(folder, variables)
    found.losses += checks.losses(
        folder, outs=home.outs, entries=home.entries, store=folder / STORE, environment=variables
    )
    return found


def plain_repro(home: Home, folder: Path) -> tuple[int, str]:
    """Exit status and output of a `dvc repro`; one that hangs is ended."""
    with repro(folder, environment(home.folder), folder.with_name("recovery.log")) as running:
        try:
            return running.wait(home.deadline), running.said
        except subprocess.TimeoutExpired:
            running.end()
            return -1, f"{running.said}\nit did not end in {PATIENCE} s"


def sync(folder: Path, variables: Mapping[str, str]) -> list[str]:
    """Bring MLflow up to date; what is wrong with that."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.sync"], cwd=folder, env=dict(variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
    )  # fmt: skip
    return (
        [f"tools.sync: exit status {done.returncode}: {done.stdout[-1500:]}"] if done.returncode else []
    )


def must_resume(folder: Path, training: Training) -> bool:
    """Whether there is a resume point, or a result, from which the next training has to go on.

    Not when a trainer lives on without its DVC: what the next one then finds is a matter of time.
    """
    whole = [path for path in training.states(folder) if not path.name.endswith(".fresh.pt")]
    return bool(whole) and not checks.processes_in(folder)
