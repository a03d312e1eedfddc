"""The processes of one training: which rank this one has, and how many were asked for.

torchrun tells each process its rank by environment variables, and so does `torchrun.launch`. Without
them there is one process, and everything here does nothing.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from pipeline.infra.errors import UserError

PROCESSES_VARIABLE = "BLOCKDROP_PROCESSES"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING_TIMEOUT = timedelta(minutes=10)  # for all processes to connect
# The other ranks wait for rank 0 while it validates, or while it waits for another training of the same.
# A process that ends closes its connections, which the others notice at once; a machine that falls
# silent is torchrun's to notice.
COLLECTIVE_TIMEOUT = timedelta(days=7)
RANK0_SECONDS = 5.0  # for rank 0 to end first; torchrun then ends the others


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """The rank of this process, from 0 on over all machines, of `size`; `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def rank_info() -> RankInfo:
    """Read this process's rank from torchrun's variables.

    Raises:
        UserError: some of the variables are missing, or they contradict each other.
    """
    values = {name: os.environ.get(name, "") for name in TORCHRUN_VARIABLES}
    if not values["RANK"] and not values["WORLD_SIZE"]:
        return RankInfo()
    missing = [name for name, value in values.items() if not value]
    if missing:
        present = " and ".join(name for name in ("RANK", "WORLD_SIZE") if values[name])
        raise UserError(
            f"{present} is set, but {', '.join(missing)} is not; start it by torchrun, or unset it"
        )
    rank, size = _whole_number("RANK"), _whole_number("WORLD_SIZE")
    local = _whole_number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else 0
    if rank >= size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={size}; start it by torchrun, or unset both")
    return RankInfo(rank=rank, size=size, local=local)


def is_main() -> bool:
    """Whether this process prints, logs and writes: the only one, or rank 0."""
    return rank_info().rank == 0


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
        UserError: torchrun's variables can't be used, or the machine has too few CUDA devices.
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
    store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING_TIMEOUT))
    distributed.init_process_group(
        backends, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    yield  # no `finally`: after an error the other processes are gone, and NCCL would wait for them
    distributed.destroy_process_group()


def describe(device: str) -> str:
    """One line for logs and reports: the device, and how many processes trained on such ones."""
    size = rank_info().size
    return device + (f", {size} processes" if size > 1 else "")


def wait_for_rank0_exit() -> None:
    """Let rank 0 end first after an error: its message speaks for all, and it ends the run in MLflow.

    torchrun then ends this process. If only this one has failed, it prints its message after the wait.
    """
    if not is_main():
        time.sleep(RANK0_SECONDS)


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


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}, which is no number; start it by torchrun, or unset it")
    return int(text)


def _require_devices(count: int, reason: str, device: torch.device) -> None:
    available = torch.cuda.device_count() if device.type == "cuda" else count
    if count > available:
        raise UserError(
            f"{reason}, but there are {available} CUDA devices; use one process for each (at most "
            f"{available}), or set BLOCKDROP_DEVICE=cpu"
        )
