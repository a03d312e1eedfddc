"""One process at a time, with a word to whoever waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(path: Path, *, waiting: str) -> Iterator[None]:
    """Hold the lock file `path`; print `waiting` first when another process has it.

    The system frees the lock of a process that dies. The empty file stays: to remove it would race
    with who waits for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, mode=0o666)  # in a shared folder, other users of the machine take it too
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
