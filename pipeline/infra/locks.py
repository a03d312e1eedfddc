"""Lock files: one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(path: Path, *, waiting_message: str) -> Iterator[None]:
    """Hold the lock file `path`; print the message first when another process holds it.

    The system frees the lock of a process that dies. The empty file stays: to remove it would race
    with the processes that wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, mode=0o666)  # in a shared folder, other users of the machine lock it too
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting_message, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
