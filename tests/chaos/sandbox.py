"""Where faults are tried: an undisturbed run, the reference, and a fresh copy of it for each case."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from helpers import sandbox as repository

from chaos import checks
from chaos.write_faults import compile_library, count_writes, preloaded, report_of

# longer trainings than the tests have, so that most kills hit one
TINY: dict[str, dict[str, Any]] = repository.TINY | {
    "pretrain": {"epochs": 8},
    "curriculum": {"epochs": 6},
    "finetune": {"epochs": 5},
    "benchmark": repository.TINY["benchmark"] | {"batch_sizes": [4], "sole_depths": []},
    "static": {"rules": ["first"], "num_kept": [3]},
}
# trainings in an order in which they can run, with what each needs, also what trains nothing here
NEEDS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "curriculum": ("pretrain", "prune", "policy_pretrain"),
    "finetune": ("pretrain", "prune", "policy_pretrain", "curriculum"),
    "sole": (),
    "static": ("pretrain", "prune"),
}
STORE = "mlflow.db"
TRAINER, DVC = "-m stages.", "dvc repro"  # parts of the command lines of the two processes that write
PLACES = {
    TRAINER: ("models", "plots", "metrics", ".resume", STORE),
    DVC: (".dvc/cache", ".dvc/tmp", "dvc.lock"),
}
FIRST_EPOCH = " epoch 1/"  # of the line after it
TIMEOUT = 300.0  # seconds for a command to end


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training stage in the undisturbed run.

    Attributes:
        name: DVC's (sole@8).
        seconds: until its first epoch is done, and from there until DVC ends.
        writes: calls that change files, by process and place.
    """

    name: str
    seconds: tuple[float, float]
    writes: Mapping[tuple[str, str], int]

    def resume_points(self, folder: Path) -> list[Path]:
        """Its resume points and unrecorded results in a checkout."""
        return sorted((folder / ".resume").glob(f"{self.name.replace('@', '-')}-*.pt"))


@dataclass(kw_only=True)
class Sandbox:
    """The reference and what it gave.

    Attributes:
        folder: holds the reference and all copies.
        library: makes writes fail.
        outs: digests of what the stages wrote.
    """

    folder: Path
    library: Path
    trainings: list[Training] = field(default_factory=list)
    outs: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> Path:
        return self.folder / "reference" / "copy"

    def environment(self) -> dict[str, str]:
        return repository.environment(tracking=True) | {
            "DVC_SITE_CACHE_DIR": str(self.folder / "dvc-site"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes that are not needed
            "PYTHONUNBUFFERED": "1",
        }

    @contextlib.contextmanager
    def copy(self, name: str) -> Iterator[Path]:
        """A fresh copy of the reference, with room for logs beside it; at the end its processes end."""
        folder = self.folder / name.replace(" ", "-") / "copy"
        shutil.rmtree(folder.parent, ignore_errors=True)  # of an earlier try
        shutil.copytree(self.reference, folder, symlinks=True)
        try:
            yield folder
        finally:
            checks.left_processes(folder, seconds=0)

    def run(self, folder: Path, *command: str, **variables: str) -> tuple[int, str]:
        return Command(self, folder, *command, **variables).wait()


class Command:
    """A running command in a session of its own; its output goes to a log beside its folder."""

    def __init__(self, sandbox: Sandbox, folder: Path, *command: str, **variables: str) -> None:
        self.log = folder.with_name(f"{time.time_ns()}-{Path(command[0]).name}.log")
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=sandbox.environment() | variables, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def trainer(self) -> psutil.Process | None:
        """The stage that it runs now, if there is one."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if TRAINER in " ".join(child.cmdline()):
                    return child
        return None

    def sleep_until(self, text: str, seconds: float) -> None:
        """Return some seconds after it printed a text, or when it has ended."""
        latest = time.monotonic() + TIMEOUT
        while self.process.poll() is None and text not in self.output and time.monotonic() < latest:
            time.sleep(0.005)
        moment = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)

    def wait(self) -> tuple[int, str]:
        """Its exit status and output; an error when it hangs."""
        return self.process.wait(TIMEOUT), self.output


def make_sandbox(folder: Path, stages: Sequence[str]) -> Sandbox:
    """Run trainings undisturbed, one by one, with those that they need, and measure what they do."""
    sandbox = Sandbox(folder=folder, library=compile_library(folder))
    _make_reference(sandbox, stages)
    reference = sandbox.reference
    try:
        _require(*sandbox.run(reference, "dvc", "repro", "prepare"))
        _, output = sandbox.run(reference, "dvc", "stage", "list", "--name-only")
        items = [name for stage in NEEDS for name in output.split() if name.split("@")[0] == stage]
        for name in items:
            before = [need for need in NEEDS[name.split("@")[0]] if need not in NEEDS]
            if before:
                _require(*sandbox.run(reference, "dvc", "repro", *before))
            sandbox.trainings.append(_measure(sandbox, name))
        _require(*sandbox.run(reference, "dvc", "repro"))
    finally:
        checks.left_processes(reference, seconds=0)
    sandbox.outs = repository.digests(reference)
    return sandbox


def _make_reference(sandbox: Sandbox, stages: Sequence[str]) -> None:
    """A copy of the repository with tiny parameters, and of its stages the trainings alone."""
    folder = sandbox.reference
    folder.mkdir(parents=True)
    repository.make(folder, changes=TINY)
    native = repository.ROOT / ".native"
    if native.is_dir():  # compiled already
        shutil.copytree(native, folder / ".native", dirs_exist_ok=True)
    (folder / ".dvc/config.local").write_text("[core]\n    check_update = false\n")
    shutil.copyfile(folder / "dvc.yaml", sandbox.folder / "dvc.yaml")
    whole = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    names = {"check", "prepare", *stages, *(need for stage in stages for need in NEEDS[stage])}
    trainings = {name: whole[name] for name in whole if name in names}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": trainings}, sort_keys=False))


def _measure(sandbox: Sandbox, name: str) -> Training:
    reference = sandbox.reference
    report_of(reference).unlink(missing_ok=True)
    places = [place for places in PLACES.values() for place in places]
    counting = preloaded(sandbox.library, reference, places)
    begun = time.monotonic()
    running = Command(sandbox, reference, "dvc", "repro", "--single-item", name, **counting)
    running.sleep_until(FIRST_EPOCH, 0)
    first_epoch = time.monotonic()
    _require(*running.wait())
    return Training(
        name=name,
        seconds=(first_epoch - begun, time.monotonic() - first_epoch),
        writes=count_writes(reference, (TRAINER, DVC)),
    )


def _require(status: int, output: str) -> None:
    if status:
        raise SystemExit(f"error: it fails without any fault:\n{output[-1500:]}")


def forget(folder: Path, training: Training) -> None:
    """Make DVC run a stage again: no entry in dvc.lock, none in the run cache, no resume point."""
    path = folder / "dvc.lock"
    content = yaml.safe_load(path.read_text())
    command = content["stages"].pop(training.name)["cmd"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    for entry in (folder / ".dvc/cache/runs").glob("*/*/*"):
        if yaml.safe_load(entry.read_text())["cmd"] == command:
            entry.unlink()
            entry.parent.rmdir()  # DVC fails at an empty one
    for point in training.resume_points(folder):
        point.unlink()
