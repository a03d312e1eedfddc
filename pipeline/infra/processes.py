"""The processes of one training: which of them this is, how many were asked for, who speaks and writes.

torchrun tells each process its place by environment variables; so does `stages/support/launcher.py`. Without them
there is one process, and everything here is as if this file were not.
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

VARIABLE = "BLOCKDROP_PROCESSES"
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
# For what process 0 does alone while the others wait: validation, or to wait for another training of
# the same. One that ends closes its connections, which is noticed at once; a machine that falls silent
# is the launcher's to notice.
PATIENCE = timedelta(days=7)
MEETING = timedelta(minutes=10)  # for all processes to be there
LINGER = 5.0  # seconds for process 0 to end first; whoever started them then ends the others


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Which process this is, counted from 0 over all machines, of how many; `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def rank_info() -> RankInfo:
    """Which process this is.

    Raises:
        UserError: the environment says it in part, or says what can't be.
    """
    told = {name: os.environ.get(name, "") for name in PLACE}
    if not told["RANK"] and not told["WORLD_SIZE"]:
        return RankInfo()
    lacking = [name for name, text in told.items() if not text]
    if lacking:
        there = " and ".join(name for name in PLACE[:2] if told[name])
        raise UserError(
            f"{there} is set, but {', '.join(lacking)} is not; start it by torchrun, or unset it"
        )
    rank, size = _whole("RANK"), _whole("WORLD_SIZE")
    local = _whole("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else 0
    if rank >= size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={size}; start it by torchrun, or unset both")
    return RankInfo(rank=rank, size=size, local=local)


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes: the only one, or the one of rank 0."""
    return rank_info().rank == 0


def requested_world_size(device: torch.device) -> int:
    """How many processes BLOCKDROP_PROCESSES wants on this machine; 1 where it says nothing.

    Raises:
        UserError: no number of processes, or more than there are CUDA devices to train on.
    """
    told = os.environ.get(VARIABLE, "")
    if not told:
        return 1
    if not (told.isascii() and told.isdecimal() and int(told) > 0):
        raise UserError(
            f"{VARIABLE} is {told!r}; set it to a number of processes from 1 on (one for each GPU), or "
            "unset it"
        )
    _require_devices(int(told), f"{VARIABLE} is {told}", device)
    return int(told)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """In the context the processes of this training know each other.

    Raises:
        UserError: the environment says what can't be.
    """
    own = rank_info()
    if own.size == 1:
        yield
        return
    _take_device(own, device)
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING))
    distributed.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    yield  # after an error there is nobody to part from in good order, and NCCL would wait for them
    distributed.destroy_process_group()


def describe(device: str) -> str:
    """One line for logs and reports: what trained, and in how many processes."""
    size = rank_info().size
    return device + (f", {size} processes" if size > 1 else "")


def wait_for_rank0_exit() -> None:
    """Let process 0 end first: it says what went wrong for all, and ends the run in MLflow.

    Whoever started the processes then ends this one. One that fails alone speaks after this.
    """
    if not is_main():
        time.sleep(LINGER)


def explain_peer_failure(error: BaseException) -> str | None:
    """One line on another process that has ended; None for other errors, and where there is no other."""
    if rank_info().size == 1 or not isinstance(error, RuntimeError):
        return None
    # gloo raises plain RuntimeErrors, NCCL and the store those of its own
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    if not isinstance(error, distributed.DistError) and not any(w in str(error) for w in words):
        return None
    reason = str(error).strip().splitlines()[0].split(". ")[0]
    return (
        f"another process of this training has ended or can't be reached ({reason}); it says why, "
        "unless it was killed; repeat, and it goes on from the last save"
    )


def _take_device(own: RankInfo, device: torch.device) -> None:
    """Make "cuda" mean this process's own device, where CUDA is what is trained on.

    Raises:
        UserError: the machine has fewer devices than processes.
    """
    _require_devices(own.local + 1, f"LOCAL_RANK is {own.local}", device)
    if device.type == "cuda":
        torch.cuda.set_device(own.local)


def _whole(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}, which is no number; start it by torchrun, or unset it")
    return int(text)


def _require_devices(count: int, told: str, device: torch.device) -> None:
    if device.type == "cuda" and count > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(
            f"{told}, but there are {there} CUDA devices; use one process for each (at most {there}), "
            "or set BLOCKDROP_DEVICE=cpu"
        )
