"""The processes of one training: how many were asked for, and how they meet.

Without torchrun's variables (`ranks`) there is one process, and everything here does nothing.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import distributed

from pipeline.infra.errors import UserError
from pipeline.infra.ranks import RankInfo, rank_info, whole_number

PROCESSES_VARIABLE = "BLOCKDROP_PROCESSES"
MEETING_TIMEOUT = timedelta(minutes=10)  # for all processes to connect
# The other ranks wait for rank 0 while it validates, or while it waits for another training of the same.
# A process that ends closes its connections, which the others notice at once. A machine that falls
# silent closes none, and torchrun does not look after it either: SILENCE_SECONDS are for that.
COLLECTIVE_TIMEOUT = timedelta(days=7)
SILENCE_SECONDS = 300  # without a sign of another machine; a switch restarts in less
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def requested_world_size(device: torch.device) -> int:
    """How many processes BLOCKDROP_PROCESSES asks for on this machine; 1 where it is not set.

    Raises:
        UserError: it is no number of processes, or more than there are CUDA devices to train on.
    """
    text = os.environ.get(PROCESSES_VARIABLE, "")
    if not text:
        return 1
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UserError(
            f"{PROCESSES_VARIABLE} is {text!r}; set it to a number of processes from 1 on (one for each "
            "GPU), or unset it"
        )
    _require_devices(int(text), f"{PROCESSES_VARIABLE} is {text}", device)
    return int(text)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes of this training for as long as the context lasts.

    Raises:
        UserError: torchrun's variables can't be used, the machine has too few CUDA devices, or the
            processes' params.yaml differ.
    """
    info = rank_info()
    if info.size == 1:
        yield
        return
    _require_devices(info.local + 1, f"LOCAL_RANK is {info.local}", device)
    backends = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(info.local)  # what "cuda" means from here on
        backends = "cpu:gloo,cuda:nccl"
    if not os.environ.get(INTERFACE_VARIABLE) and (name := _interface()):
        os.environ[INTERFACE_VARIABLE] = name
    store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING_TIMEOUT))
    _require_same_params(store, info)
    # not yet COLLECTIVE_TIMEOUT: nothing tells this process of one that ends before it has connected
    distributed.init_process_group(
        backends, store=store, rank=rank, world_size=size, timeout=MEETING_TIMEOUT
    )
    _set_timeout(COLLECTIVE_TIMEOUT)
    _watch_connections(SILENCE_SECONDS)
    yield  # no `finally`: after an error the other processes are gone, and NCCL would wait for them
    distributed.destroy_process_group()


def explain_peer_failure(error: BaseException) -> str | None:
    """One line when another process of this training has ended; None for any other error."""
    if rank_info().size == 1 or not isinstance(error, RuntimeError):
        return None
    # gloo raises plain RuntimeErrors, NCCL and the store those of their own
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    if not isinstance(error, distributed.DistError) and not any(w in str(error) for w in words):
        return None
    reason = str(error).strip().splitlines()[0].split(". ")[0]
    return (
        f"another process of this training has ended or can't be reached ({reason}); it says why, "
        "unless it was killed; repeat, and it goes on from the last save"
    )


def _interface() -> str | None:
    """The network interface by which this machine reaches MASTER_ADDR; None where none has its address.

    Gloo by itself takes the one that the machine's own name stands for. That is often the loopback,
    by which no other machine reaches it.

    Raises:
        UserError: MASTER_ADDR leads nowhere, or to this machine alone while there are others.
    """
    master, port = os.environ["MASTER_ADDR"], whole_number("MASTER_PORT")
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of UDP: it sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"this machine has no way to MASTER_ADDR={master} ({error.strerror}); give torchrun "
            "--master-addr an address of the first machine that all machines reach"
        ) from None
    if ipaddress.ip_address(own).is_loopback and _has_other_machines():
        raise UserError(
            f"MASTER_ADDR={master} stands for {address[0]} here, by which no other machine reaches this "
            "one; give torchrun --master-addr the first machine's address in the network, or set "
            f"{INTERFACE_VARIABLE} to the interface that leads there"
        )
    if ipaddress.ip_address(own).is_loopback:
        own = "127.0.0.1"  # of the many that it has, the one that its interface is listed with
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address for address in addresses}:
            return name
    return None


def _has_other_machines() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or rank_info().size) < rank_info().size


def _require_same_params(store: distributed.Store, info: RankInfo) -> None:
    """See that params.yaml has the same values for all processes: with others one may not train at all.

    (Data, code and libraries are compared by the stage, once it knows its inputs.)
    """
    path = Path("params.yaml")
    store.set(f"params/{info.rank}", path.read_text(encoding="utf-8") if path.exists() else "{}")
    texts = [store.get(f"params/{rank}") for rank in range(info.size)]
    store.set(f"params read/{info.rank}", "")
    if info.rank == 0:  # whose machine holds the store, and may end first
        store.wait([f"params read/{rank}" for rank in range(info.size)])
    for rank, text in enumerate(texts):
        if text == texts[0]:
            continue
        first, other = (dict(_values(yaml.safe_load(t))) for t in (texts[0], text))
        keys = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if keys:
            raise UserError(
                f"params.yaml of process {rank + 1} of {info.size} differs from that of process 1 in "
                f"{', '.join(keys[:5])}; give every machine the same commit and params.yaml"
            )


def _values(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested sections under its dotted key."""
    if not isinstance(tree, dict):
        yield name.removeprefix("."), tree
        return
    for key, inner in tree.items():
        yield from _values(inner, f"{name}.{key}")


def _set_timeout(timeout: timedelta) -> None:
    """The timeout of collectives from now on; older PyTorch has the function under a private name."""
    set_timeout = getattr(distributed, "set_timeout", None)
    (set_timeout or distributed.distributed_c10d._set_pg_timeout)(timeout, distributed.group.WORLD)


def _watch_connections(seconds: int) -> None:
    """Have the system ask the other machines for a sign, and end connections to those that give none.

    Without that, a process that only receives would wait for ever. Where it has sent something, the
    system gives up by itself, in a quarter of an hour. (TCP_USER_TIMEOUT would shorten that, but it also
    ends the connection to a process that is alive and does not read for so long.) The other machine's
    system answers, whatever the process there computes or waits for.
    """
    options = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): max(1, seconds // 4),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): max(1, seconds // 4),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
    }
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            # one that gloo has just closed, since the other end is gone, is no longer there
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as same:
                for (level, option), value in options.items():
                    same.setsockopt(level, option, value)


def _require_devices(count: int, reason: str, device: torch.device) -> None:
    available = torch.cuda.device_count() if device.type == "cuda" else count
    if count > available:
        raise UserError(
            f"{reason}, but there are {available} CUDA devices; use one process for each (at most "
            f"{available}), or set BLOCKDROP_DEVICE=cpu"
        )
