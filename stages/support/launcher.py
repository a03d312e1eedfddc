"""Several processes of a training stage on this machine, as BLOCKDROP_PROCESSES asks for.

What torchrun would do, with a stage's own manners: a signal reaches every process, their status is this
one's (torchrun's is 1 whatever they end with), and nothing is printed beside what they print.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

from torch.distributed import TCPStore

POLL_SECONDS = 0.05
ALONE_SECONDS = 15.0  # for process 0 to end by itself, when another one has failed
END_SECONDS = 30.0  # for processes to end that were told to


def run(count: int) -> int:
    """Start this very command `count` times and wait; the exit status that this process should have."""
    # the place where they find each other is held by this process: no port is taken between two calls
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            _send(child, number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, pass_on)
    command = [sys.executable, *sys.orig_argv[1:]]
    for rank in range(count):
        own = os.environ | _place(rank, count, store.port)
        children.append(subprocess.Popen(command, env=own))
    for early in asked[:1]:  # it came before all of them were there
        pass_on(early, None)
    return _wait(children)


def _place(rank: int, count: int, port: int) -> Mapping[str, str]:
    """What torchrun tells a process by its environment."""
    told = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there, process 0 need not open one
    }
    if "OMP_NUM_THREADS" not in os.environ:
        told["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        told["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: not whatever its name resolves to
    return told


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """The status of the first process that failed, after all have ended; 0 where none did."""
    status, failed = 0, 0.0
    while any(child.poll() is None for child in children):
        time.sleep(POLL_SECONDS)
        bad = next((child for child in children if child.poll()), None)
        if bad is None:
            continue
        now = time.monotonic()
        if not status:
            status, failed = _status(children, bad), now
        # process 0 says what went wrong; where it has, or can't, the others are ended
        if children[0].poll() is not None or now - failed > ALONE_SECONDS:
            return _ended(children, status)
    bad = next((child for child in children if child.poll()), None)
    return status or (0 if bad is None else _status(children, bad))


def _ended(children: list[subprocess.Popen[bytes]], status: int) -> int:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_SECONDS
        for child in children:
            _send(child, number)
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    return status


def _send(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _status(children: list[subprocess.Popen[bytes]], child: subprocess.Popen[bytes]) -> int:
    """As a shell gives it; a process that was killed could not say so itself."""
    if child.returncode > 0:
        return child.returncode
    number = -child.returncode
    name = signal.Signals(number).name
    if number not in (signal.SIGTERM, signal.SIGINT):
        place = f"process {children.index(child) + 1} of {len(children)}"
        print(f"error: {place} was killed by {name}; repeat, and it goes on from the last save",
              file=sys.stderr)  # fmt: skip
    return 128 + number
