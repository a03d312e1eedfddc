"""Several processes of a training on this machine, as BLOCKDROP_PROCESSES asks for: torchrun's agent.

The agent runs inside this process and not as a command of its own, because this process knows when DVC
has died (`signals.exit_with_parent`), and because the command flattens every exit status to 1.
"""

import logging
import os
import signal
import socket
import sys
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

STOP_SECONDS = 3600  # after a signal, for the step or validation that runs to end and be saved


def launch(count: int) -> int:
    """Run this process's command `count` times and wait; the exit status that this process should have.

    A signal reaches every process. When one fails the agent ends the others: by SIGTERM, after 30
    seconds by SIGKILL.
    """
    logging.disable(logging.ERROR)  # the agent's reports; the processes print their own messages
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # not whatever this machine's name resolves to
    stop_signals = [
        n for n in ("SIGINT", "SIGTERM") if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN
    ]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        max_restarts=0,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=",".join(stop_signals),
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(
            f"error: process {rank + 1} of {count} was killed by {failure.signal_name()}; repeat, and "
            "it goes on from the last save",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    return 0
