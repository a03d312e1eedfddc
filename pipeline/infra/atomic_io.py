"""Files that are whole or not there: what is read later was written to its end."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` in the place of whatever `path` holds, with no moment at which half of it is there.

    A new file beside the old one is filled, brought to the disk, and renamed; where any of that fails
    the old file is as it was.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with failures_name(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_over(path)
            write_through(temporary, content)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the folder may be what can't be written
                temporary.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    """Remove what processes left that were killed while they wrote the same file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        import psutil  # a served model, which writes nothing, does without

        writer = left.name.split(".")[-2]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def failures_name(path: Path) -> Iterator[None]:
    """Let an OSError in here name `path`: not a temporary file, which nobody knows, and not nothing."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def write_through(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk, where the system can (Windows opens no folder)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
