"""Requests to stop: Ctrl-C, SIGTERM, and the death of the process that started this one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

POLL_SECONDS = 0.5
SAME_KEY_SECONDS = 0.5  # a second SIGINT within them is the same Ctrl-C, passed on by a parent


class StopSignal:
    """The signal that asked this process to stop; None while there is none."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def raise_signal(self) -> None:
        """Raise KeyboardInterrupt for SIGINT, SystemExit(128 + number) for another signal."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            sys.exit(128 + self.number)


def exit_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit(143), so that what is open is closed."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def exit_with_parent(parent: int) -> None:
    """Send this process a SIGTERM when its parent has died.

    DVC, when it is killed, leaves the stage that it started behind. Beside the next `dvc repro` that
    stage would write into the same files.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        print("the process that started this one has died; stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


@contextmanager
def deferred_signals(*, quiet: bool = False) -> Iterator[StopSignal]:
    """Note Ctrl-C and SIGTERM instead of obeying them; the work asks for them where it can stop.

    A second Ctrl-C ends the work at once. A signal that the process was started to ignore (by nohup,
    or in the background of a script) stays ignored. Threads other than the main one get no signals.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    noted_at = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted_at
        if stop.number is None:
            stop.number, noted_at = number, time.monotonic()
            if not quiet:  # the signal may have interrupted a print(), which can't be entered twice
                os.write(2, b"\nstopping after this step (Ctrl-C again: at once)\n")
        elif number == signal.SIGINT and time.monotonic() - noted_at > SAME_KEY_SECONDS:
            raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
