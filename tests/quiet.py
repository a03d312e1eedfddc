"""A quiet machine for the tests that measure time, whatever the other workers have to do."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Be one of many in a folder's room, or alone in it; processes and threads alike.

    Whoever wants to be alone holds the door against those who come later, so those inside get fewer.
    """
    with (folder / "door").open("w") as door, (folder / "room").open("w") as inside:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(inside, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # not left to the closing of the file, which a forked child may hold open
            fcntl.flock(inside, fcntl.LOCK_UN)
