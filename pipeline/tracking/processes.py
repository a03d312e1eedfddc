"""The processes behind runs that are RUNNING: this one, DVC's that started it, and whether one lives."""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The `dvc repro` or `dvc exp run` that runs an experiment's stages one after the other."""

    process: str  # as `this_process` describes one
    targets: frozenset[str]  # words of its command line, stages that it was to stop at among them


def this_process() -> str:
    """Machine, number and start of this process; numbers are reused."""
    return _describe(psutil.Process())


def driver() -> Driver | None:
    """DVC's process that started this stage; None where the stage was started in another way."""
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            # .venv/bin/python .venv/bin/dvc repro, or python -m dvc exp exec-run
            if "dvc" in {Path(word).name for word in words[:3]}:
                targets = frozenset(word.partition("@")[0] for word in words)  # sole@20 is of sole
                return Driver(process=_describe(process), targets=targets)
    except psutil.Error:  # another user's, or it has just ended
        pass
    return None


def is_here(description: str) -> bool:
    """Whether the process is of this machine, so that `is_alive` knows of it."""
    return description.startswith(f"{platform.node()} ")


def is_alive(description: str) -> bool:
    """Whether the process that a description is of still runs."""
    try:
        _, pid, created = description.rsplit(" ", 2)
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 1
    except (ValueError, psutil.Error):
        return False


def _describe(process: psutil.Process) -> str:
    return f"{platform.node()} {process.pid} {process.create_time():.1f}"
