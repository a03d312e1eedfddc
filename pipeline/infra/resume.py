"""Resume points of trainings: written atomically, found again by what the result depends on.

They lie in `.resume/` of the main checkout: outside DVC's outs, which DVC empties before a run, and
outside the folder of `dvc exp run --temp`, which is deleted. A file begins with the SHA-256 of the rest,
which is a torch.save of plain types and tensors.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.infra.atomic_io import failures_name, sync_folder, write_through
from pipeline.infra.locks import exclusive
from pipeline.infra.safe_io import open_regular

PROJECT_MARK = ".dvc"
FOLDER = ".resume"
DAY = 24 * 3600.0
KEEP_FINISHED = 1 * DAY  # for processes that waited; by then DVC has recorded the result
KEEP_INTERRUPTED = 60 * DAY


def project_root() -> Path:
    """The main checkout, also from inside a temporary one of `dvc exp run --temp`.

    Under DVC it is DVC_ROOT, by hand the nearest folder above that holds `.dvc`.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    folder = Path.cwd()
    return next((p for p in (folder, *folder.parents) if (p / PROJECT_MARK).is_dir()), folder)


def key_of(**ingredients: object) -> str:
    """A name for everything that a training's result depends on: other ingredients, another name."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_files(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The file that holds a training's last state."""

    path: Path  # of the last state, while the training runs or is interrupted

    @classmethod
    def of(cls, stage: str, key: str) -> "ResumePoint":
        return cls(path=project_root() / FOLDER / f"{stage}-{key}.pt")

    @property
    def previous(self) -> Path:
        """The state before the last one, for a disk that gives back other bytes than it got."""
        return self.path.with_suffix(".previous.pt")

    @property
    def finished(self) -> Path:
        """The last state, once the training has ended and its result is written."""
        return self.path.with_suffix(".finished.pt")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time do this training; another (a queue worker) waits for it."""
        message = f"waiting: another process is at the same training ({self.path.stem})"
        with exclusive(self.path.with_suffix(".lock"), waiting_message=message):
            yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the last state by a new one, which is read back first.

        Raises:
            OSError: it can't be written; the old states are as they were.
        """
        with failures_name(self.path):
            fresh = self._write(state)
            if self.path.exists():
                self.path.replace(self.previous)
            fresh.replace(self.path)
            sync_folder(self.path.parent)

    def load(self) -> dict[str, Any] | None:
        """Read the last state that is whole; None when there is none (the training then starts over)."""
        for path in (self.path, self.previous):
            state = _read(path)
            if state is not None:
                return state
        if self.path.exists() or self.previous.exists():
            print("no state can be used; starting from the first epoch", flush=True)
        return None

    def load_finished(self) -> dict[str, Any] | None:
        """Read the last state of this very training, if a process finished it before."""
        return _read(self.finished)

    def finish(self) -> None:
        """Mark the last state as that of a finished training, for processes that wait for it.

        Raises:
            OSError: it can't be renamed; the states are as they were.
        """
        with failures_name(self.finished):
            self.path.replace(self.finished)
            self.previous.unlink(missing_ok=True)
            sync_folder(self.path.parent)
        tidy(self.path.parent)

    def _write(self, state: Mapping[str, Any]) -> Path:
        fresh = self.path.with_suffix(".fresh.pt")
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)  # it may be a pipe, whose reader would be waited for
            write_through(fresh, content)
            if fresh.read_bytes() != content:
                raise OSError(errno.EIO, "the disk gives back other bytes than were written")
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        return fresh


def tidy(folder: Path, *, now: float | None = None) -> None:
    """Remove states that are too old: of finished trainings after a day, of others after 60 days."""
    now = time.time() if now is None else now
    for path in folder.glob("*.pt"):
        max_age = KEEP_FINISHED if path.name.endswith(".finished.pt") else KEEP_INTERRUPTED
        with contextlib.suppress(OSError):  # another process tidies as well
            if now - path.stat().st_mtime > max_age:
                path.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open_regular(path) as file:
            stored = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        print(f"{path} can't be read ({error.strerror}), so what it holds is not used", flush=True)
        return None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(stored[size:]).digest() != stored[:size]:
        print(f"{path} is damaged, so what it holds is not used", flush=True)
        return None
    try:
        return torch.load(io.BytesIO(stored[size:]), map_location="cpu", weights_only=True)
    except Exception as error:  # whole, but no state: torch.load raises whatever the bytes break
        print(f"{path} is no resume point ({error}), so it is not used", flush=True)
        return None
