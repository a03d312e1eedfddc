"""Load of processors, memory and GPUs while a training runs, under the names that MLflow gives them.

MLflow's own monitor is a thread that calls the store by itself: with a server that hangs, its end waits
for minutes, and after one failure it stops without a word. Here the steps of the training take the
samples, and `StageRun` logs them with its other metrics. MLflow's variables count all the same:
MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false takes none, and MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is in
seconds.
"""

import contextlib
import math
import os
import time
from typing import TYPE_CHECKING, Any

from pipeline.infra.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Metric

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
PREFIX = "system/"  # MLflow shows these on a page of their own
SECONDS = 10.0  # between samples


def sampling_interval() -> float:
    """Seconds between samples, as MLflow's variables say; infinite where there are to be none.

    Raises:
        UserError: a variable has a value that it can't have.
    """
    switch, interval = os.environ.get(SWITCH, "").strip().lower(), os.environ.get(INTERVAL) or SECONDS
    if switch not in ("", "true", "false", "1", "0"):
        raise UserError(f"{SWITCH} is {switch!r}; set it to true or false, or unset it (true)")
    if switch in ("false", "0"):
        return math.inf
    with contextlib.suppress(ValueError):
        if (seconds := float(interval)) > 0:
            return seconds
    raise UserError(f"{INTERVAL} is {interval!r}; set it to seconds above 0, or unset it ({SECONDS:g})")


class SystemMetrics:
    """The samples of one run.

    Args:
        interval: seconds between two samples.
        step: of the first one; a resumed run has earlier ones.
    """

    def __init__(self, interval: float, step: int = 0) -> None:
        self._interval, self._step = interval, step
        self._monitors = _monitors() if interval < math.inf else []
        self._due = time.monotonic() + interval

    def sample(self) -> "list[Metric]":
        """A sample if it is time for one, else nothing; a counter that can't be read is left out."""
        if time.monotonic() < self._due:
            return []
        from mlflow.entities import Metric

        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # of psutil or the driver: no training needs them
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        now, step = int(time.time() * 1000), self._step
        self._step += 1
        self._due = time.monotonic() + self._interval
        return [Metric(PREFIX + name, float(value), now, step) for name, value in values.items()]


def _monitors() -> list[Any]:
    """MLflow's, without the GPU's where nvidia-ml-py, a driver or a GPU is missing."""
    import psutil
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    psutil.cpu_percent()  # its next answer is the mean since this call
    monitors: list[Any] = [CPUMonitor()]
    with contextlib.suppress(Exception):
        monitors.append(GPUMonitor())
    return monitors
