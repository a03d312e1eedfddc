"""One thread for each core, each with a part of the batch.

On CPUs this is faster than one batch whose every operation is split over all cores: a part stays in its
core's cache, and threads do not wait for each other after each operation.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_torch(call: Callable[[T], R], items: Sequence[T], *, threads: int) -> list[R]:
    """call(item) for each item, in order, in threads that run PyTorch without its own parallelism.

    The threads end with the call: while they exist, libgomp counts more threads than cores and puts
    waiting ones to sleep, which makes small operations of the calling thread 2.5 times slower.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        return [call(item) for item in items]
    threads_before = torch.get_num_threads()
    ready = threading.Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start later
        ready.wait()

    try:
        with ThreadPoolExecutor(threads, "executor", initializer=begin) as pool:
            futures = [pool.submit(call, item) for item in items]
            return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads_before)


class NativeThreads:
    """`count` threads, the calling one included, for code without PyTorch and without the GIL."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()  # the threads of a call wait for each other: one call at a time
        self._pool = ThreadPoolExecutor(max(1, count - 1), "native")  # starts no thread yet

    def run(self, call: Callable[[int], None], members: int) -> None:
        """call(0), ..., call(members - 1) at the same time."""
        assert members <= self.count
        with self._lock:
            others = [self._pool.submit(call, member) for member in range(1, members)]
            call(0)
            for other in others:
                other.result()


@cache
def native_threads(count: int) -> NativeThreads:
    """The threads that all native executors share, so that they don't compete for cores."""
    return NativeThreads(count)
