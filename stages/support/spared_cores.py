"""The number of threads of a training on a machine that other programs use too."""

import contextlib
import os
import time

import psutil
import torch

from pipeline.device import usable_cores


class SparedCores:
    """Gives PyTorch as many threads as there are cores that no other program keeps busy.

    An operation of a training step is split over all threads and ends with the slowest of them. Where
    another program holds one of the cores, each of the hundreds of operations of a step waits for that
    program's time slice to end. One thread waits for nobody.

    The number of threads decides the order in which numbers are summed, so beside other work a training
    repeats its results but for float noise. OMP_NUM_THREADS fixes the number, and with it the bytes.
    The number at the start, `most`, is never exceeded; `fewest` is the least so far.
    """

    SECONDS = 1.0  # between two measurements of the machine
    FEWER_AFTER = 2  # measurements in a row with cores taken; a short burst changes nothing
    MORE_AFTER = 5  # measurements in a row with cores free again

    def __init__(self, device: torch.device) -> None:
        self.most = self.fewest = torch.get_num_threads()
        self.fixed = device.type != "cpu" or self.most == 1 or bool(os.environ.get("OMP_NUM_THREADS"))
        self._process = psutil.Process()
        self._taken = self._free = 0  # measurements in a row
        self._last = self._measure()

    def adapt(self) -> int | None:
        """Measure, between two steps; return the new number of threads if it has just changed."""
        if self.fixed or time.monotonic() - self._last[0] < self.SECONDS:
            return None
        before, self._last = self._last, self._measure()
        seconds, all_busy, own_busy = (now - then for now, then in zip(self._last, before, strict=True))
        cores_left = len(usable_cores()) - (all_busy - own_busy) / seconds
        threads, target = torch.get_num_threads(), min(self.most, max(1, int(cores_left + 0.5)))
        self._taken = self._taken + 1 if target < threads else 0
        self._free = self._free + 1 if target > threads else 0
        if self._taken < self.FEWER_AFTER and self._free < self.MORE_AFTER:
            return None
        self._taken = self._free = 0
        torch.set_num_threads(target)
        self.fewest = min(self.fewest, target)
        return target

    def _measure(self) -> tuple[float, float, float]:
        """Seconds of the clock, of work on all usable cores, and of work by this training."""
        times = psutil.cpu_times(percpu=True)
        busy = sum(sum(times[core][:8]) - times[core].idle - getattr(times[core], "iowait", 0.0)
                   for core in usable_cores())  # fmt: skip
        this = self._process.cpu_times()
        ours = this.user + this.system + this.children_user + this.children_system
        for child in self._process.children(recursive=True):  # they decode images
            with contextlib.suppress(psutil.Error):  # it has ended
                ours += sum(child.cpu_times()[:2])
        return time.monotonic(), busy, ours
