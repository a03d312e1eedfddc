"""Signals: noted while something must be brought to its end, obeyed at once otherwise."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from pipeline.infra import signals
from pipeline.infra.signals import deferred_signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_first_signal_is_noted_and_the_work_goes_on(capfd):
    done = []
    with deferred_signals() as stop:
        assert stop.number is None
        stop.raise_signal()
        send(signal.SIGINT)
        done.append(1)
    assert done
    assert stop.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stop.raise_signal()
    assert "stopping after this step" in capfd.readouterr().err


def test_sigterm_leaves_with_its_status():
    with deferred_signals() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # whoever sends it twice gets no less saved
    with pytest.raises(SystemExit) as raised:
        stop.raise_signal()
    assert raised.value.code == 143


def test_second_ctrl_c_leaves_at_once(monkeypatch):
    monkeypatch.setattr(signals, "SAME_KEY_SECONDS", 0.01)
    reached = []

    def work() -> None:
        with deferred_signals():
            send(signal.SIGINT)
            time.sleep(0.02)
            send(signal.SIGINT)
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not reached


def test_one_ctrl_c_that_comes_twice_is_one():
    with deferred_signals() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert stop.number == signal.SIGINT


def test_afterwards_signals_do_what_they_did():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="x"), deferred_signals():
        raise ValueError("x")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_signals() as stop:
            send(signal.SIGINT)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_go_on_without_it():
    found = []

    def work() -> None:
        with deferred_signals() as stop:
            found.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


CHILD = """
    import os, sys, time
    from pipeline.infra.signals import exit_on_sigterm, exit_with_parent
    exit_on_sigterm()
    exit_with_parent(os.getppid())
    print(os.getpid(), flush=True)
    try:
        time.sleep(60)
    finally:
        open(sys.argv[1], "w").write("left")
"""
PARENT = """
    import subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
    time.sleep(60)
"""


def test_a_process_whose_parent_is_killed_leaves_as_after_sigterm(tmp_path):
    sign = tmp_path / "sign"
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), textwrap.dedent(CHILD), str(sign)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = int(parent.stdout.readline())
    time.sleep(2 * signals.POLL_SECONDS)
    assert not sign.exists()  # as long as it lives, nothing happens
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sign.exists()
    assert "has died; stopping" in parent.stderr.read()
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)
