"""Which process of a training this one is, as torchrun's environment variables say.

`torchrun.launch` sets the same ones. Without them there is one process. `processes` connects them.
"""

import os
import time
from dataclasses import dataclass

from pipeline.infra.errors import UserError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
    rank, size = whole_number("RANK"), whole_number("WORLD_SIZE")
    local = whole_number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else 0
    if rank >= size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={size}; start it by torchrun, or unset both")
    return RankInfo(rank=rank, size=size, local=local)


def is_main() -> bool:
    """Whether this process prints, logs and writes: the only one, or rank 0."""
    return rank_info().rank == 0


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


def whole_number(name: str) -> int:
    """An environment variable's number from 0 on.

    Raises:
        UserError: it is none.
    """
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}, which is no number; start it by torchrun, or unset it")
    return int(text)
