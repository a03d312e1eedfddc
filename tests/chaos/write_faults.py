"""Make the n-th write of a process under some folders fail, by a preloaded library (faults.c)."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")


def compile_library(folder: Path) -> Path:
    """The library in a folder.

    Raises:
        SystemExit: there is no C compiler.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        raise SystemExit("error: faults are written in C, and there is no C compiler; install one")
    library = folder / "faults.so"
    command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
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
    """Variables with which processes count their writes under the places of a folder.

    Args:
        process: a part of the command line of the process whose write fails.
        nth: the write that fails; 0: none.
        fault: ENOSPC, EIO, or KILL: half of the write is done, then the process gets SIGKILL.
        later: all later writes fail too, as on a full disk.
    """
    return {
        "LD_PRELOAD": str(library),
        "CHAOS_UNDER": ":".join(str(folder / place) for place in places),
        "CHAOS_PROCESS": process,
        "CHAOS_NTH": str(nth),
        "CHAOS_FAULT": fault,
        "CHAOS_LATER": str(int(later)),
        "CHAOS_REPORT": str(report_of(folder)),
    }


def report_of(folder: Path) -> Path:
    """The file beside a folder in which the library reports what it counted and hit."""
    return folder.with_name("writes")


def _report(folder: Path, kind: str) -> list[list[str]]:
    report = report_of(folder)
    lines = report.read_text().splitlines() if report.exists() else []
    return [line.split("\t")[1:] for line in lines if line.startswith(f"{kind}\t")]


def failed_write(folder: Path) -> str:
    """The call that failed, with its file; empty when none did."""
    for call, path in _report(folder, "hit"):
        return f"{call} {Path(path).relative_to(folder)}"
    return ""


def count_writes(folder: Path, processes: Sequence[str]) -> Counter[tuple[str, str]]:
    """Calls that change files, by process (a part of its command line) and place."""
    counts: Counter[tuple[str, str]] = Counter()
    for place, number, command in _report(folder, "count"):
        for process in processes:
            if process in command:
                counts[process, Path(place).relative_to(folder).as_posix()] += int(number)
    return counts
