"""Nothing else runs beside a test that measures time: the other workers wait."""

from collections.abc import Generator
from pathlib import Path

import pytest
from filelock import ReadWriteLock


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the wait does not count as the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """While a test marked `serial` runs, the other workers of this session wait between their tests.

    The lock admits no new reader while a writer waits, so a serial test gets its turn.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    lock = ReadWriteLock(Path(item.config.option.basetemp).parent / "serial.db")
    with lock.write_lock() if item.get_closest_marker("serial") else lock.read_lock():
        return (yield)
