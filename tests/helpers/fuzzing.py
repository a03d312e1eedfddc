"""Tests of bad input: limits on time and memory, and the settings of the fuzzers."""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from hypothesis import HealthCheck, settings

MAX_MESSAGE = 5000  # characters, whatever was wrong


def fuzz(examples: int) -> settings:
    """Settings with the same examples in every run, so that CI does not fail by chance."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def bounded(*, seconds: float = 20, megabytes: int = 300) -> Iterator[None]:
    """Fail when the body takes more time, or more memory on top of what the process has."""

    def stop(_number: int, _frame: object) -> None:
        raise AssertionError(f"took over {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of pytest-timeout's timer for this test
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        resource.setrlimit(
            resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (megabytes << 20), hard)
        )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)
