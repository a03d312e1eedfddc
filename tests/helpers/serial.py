"""A quiet machine for the tests that measure time, whatever the other workers have to do."""

from collections.abc import Generator
from pathlib import Path

import pytest
from filelock import ReadWriteLock


@pytest.hookimpl(wrapper=True, tryfirst=True)  # to wait counts not as a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """While a test marked `alone` runs, the other workers of this session wait between their tests.

    The lock lets no new reader in while somebody waits to write, so the turn comes.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    lock = ReadWriteLock(Path(item.config.option.basetemp).parent / "quiet.db")
    with lock.write_lock() if item.get_closest_marker("serial") else lock.read_lock():
        return (yield)
