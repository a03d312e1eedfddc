"""How many threads a training takes of a machine that others use too."""

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

    The number of threads decides in which order numbers are added up, so beside other work a training
    repeats its results but for float noise. OMP_NUM_THREADS fixes the number, and with it the bytes.

    Attributes:
        most: threads at the start, of which there are never more.
        fewest: threads that there have been at least so far.
    """

    SECONDS = 1.0  # between two looks at the machine
    FEWER_AFTER = 2  # looks in a row that find cores taken; a short burst of other work changes nothing
    MORE_AFTER = 5  # looks in a row that find cores free again

    def __init__(self, device: torch.device) -> None:
        self.most = self.fewest = torch.get_num_threads()
        self.fixed = device.type != "cpu" or self.most == 1 or bool(os.environ.get("OMP_NUM_THREADS"))
        self._process = psutil.Process()
        self._taken = self._free = 0  # looks in a row
        self._last = self._look()

    def adapt(self) -> int | None:
        """Between two steps: the new number of threads where it has just changed."""
        if self.fixed or time.monotonic() - self._last[0] < self.SECONDS:
            return None
        before, self._last = self._last, self._look()
        seconds, all_busy, own_busy = (now - then for now, then in zip(self._last, before, strict=True))
        cores_left = len(usable_cores()) - (all_busy - own_busy) / seconds
        threads, wanted = torch.get_num_threads(), min(self.most, max(1, int(cores_left + 0.5)))
        self._taken = self._taken + 1 if wanted < threads else 0
        self._free = self._free + 1 if wanted > threads else 0
        if self._taken < self.FEWER_AFTER and self._free < self.MORE_AFTER:
            return None
        self._taken = self._free = 0
        torch.set_num_threads(wanted)
        self.fewest = min(self.fewest, wanted)
        return wanted

    def _look(self) -> tuple[float, float, float]:
        """Seconds on the clock, that our cores were busy, and that this training kept cores busy."""
        times = psutil.cpu_times(percpu=True)
        busy = sum(sum(times[core][:8]) - times[core].idle - getattr(times[core], "iowait", 0.0)
                   for core in usable_cores())  # fmt: skip
        own = self._process.cpu_times()  # and of processes that decode its images
        ours = own.user + own.system + own.children_user + own.children_system
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                ours += sum(child.cpu_times()[:2])
        return time.monotonic(), busy, ours
