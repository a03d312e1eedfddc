"""Being asked to stop: Ctrl-C, SIGTERM, and the death of the process for which this one works."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.5
SAME_KEY = 0.5  # seconds in which a second SIGINT is taken for the same Ctrl-C, passed on by a parent


class StopSignal:
    """Which signal asked this process to stop, if one did."""

    def __init__(self, number: int | None = None) -> None:
        self.signal = number

    def leave(self) -> None:
        """End as the signal wants it: KeyboardInterrupt, or SystemExit with 128 + its number."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            sys.exit(128 + self.signal)


def exit_on_sigterm() -> None:
    """Make SIGTERM end this process with status 143 as an exception does: what is open is closed."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def exit_with_parent(parent: int, starter: int | None = None) -> None:
    """Send this process a SIGTERM when its parent has died: nobody wants its work any more.

    DVC starts a stage and, when it is killed, leaves it behind; beside the next `dvc repro` it would
    write into the same files.

    Args:
        parent: the parent's process id, as it was when this process began.
        starter: likewise what `starter_of` said of it.
    """

    def watch() -> None:
        while os.getppid() == parent and (starter is None or _parent_of(parent) == starter):
            time.sleep(POLL_SECONDS)
        print("the process that started this one has died; stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def dvc_pid(parent: int) -> int | None:
    """The process, DVC, for which `parent` is a shell that runs a stage; None where it is no such shell.

    Some shells stay between DVC and the stage (dash does, bash makes way). Such a one lives on when DVC
    is killed, but its own parent is then another.
    """
    return _parent_of(parent) if _is_shell_for_a_stage(parent) else None


def _parent_of(process: int) -> int | None:
    """Another process's parent; None where the system does not tell (it has no /proc)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name before may hold anything


def _is_shell_for_a_stage(process: int) -> bool:
    """Whether it is a shell that DVC told to run a stage, by its command line `... -c COMMAND`."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return False
    return len(words) > 2 and words[-2] == b"-c" and b"-m stages." in words[-1]


@contextmanager
def deferred_signals(*, quietly: bool = False) -> Iterator[StopSignal]:
    """In the context Ctrl-C and SIGTERM are noted, for the work to stop where nothing is lost.

    A second Ctrl-C ends the work at once. A signal that the process was started to ignore (by nohup,
    or in the background of a script) stays ignored. Threads other than the main one get no signals.
    """
    asked = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    noted = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if asked.signal is None:
            asked.signal, noted = number, time.monotonic()
            # print() may be what the signal came into, and can't be entered twice
            if not quietly:
                os.write(2, b"\nstopping after this step (Ctrl-C again: at once)\n")
        elif number == signal.SIGINT and time.monotonic() - noted > SAME_KEY:
            raise KeyboardInterrupt

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    heard = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in heard:
            signal.signal(number, before[number])
