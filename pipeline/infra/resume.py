"""Resume points of trainings: written atomically, found again by what the result depends on.

They lie outside DVC's outs (which DVC empties before a run) and outside the working folder of
`dvc exp run --temp` (which is deleted): in `.resume/` of the main checkout. A point is a file with the
SHA-256 of what follows, then that: torch.save of plain types and tensors.
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
KEEP_FINISHED = 1 * DAY  # DVC has it by then; it is for processes that waited for it
KEEP_INTERRUPTED = 60 * DAY


def project_root() -> Path:
    """The main checkout, also from inside a temporary one of `dvc exp run --temp`.

    DVC tells its stages by DVC_ROOT; by hand it is the nearest folder above that holds `.dvc`.
    """
    told = os.environ.get("DVC_ROOT")
    if told:
        return Path(told)
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / PROJECT_MARK).is_dir()), here)


def key_of(**ingredients: object) -> str:
    """A name for what a training's result depends on; other ingredients, another name."""
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
    """The place where one training keeps its state, and when it is done its result.

    The state before the last one is kept as well, for a disk that gives back other bytes than it got.
    """

    path: Path

    @classmethod
    def of(cls, stage: str, key: str) -> "ResumePoint":
        """The place for a stage's training with this key."""
        return cls(path=project_root() / FOLDER / f"{stage}-{key}.pt")

    @property
    def previous(self) -> Path:
        """Where the state before the last one is."""
        return self.path.with_suffix(".previous.pt")

    @property
    def finished(self) -> Path:
        """Where the state at the end is, once the result was written."""
        return self.path.with_suffix(".finished.pt")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes off the same training (a queue worker's, say) until this one is done."""
        waiting = f"waiting: another process is at the same training ({self.path.stem})"
        with exclusive(self.path.with_suffix(".lock"), waiting=waiting):
            yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the old state by a new one, which is read back first.

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
        """The last state that is whole; None when there is none (the training then starts over)."""
        for path in (self.path, self.previous):
            state = _read(path)
            if state is not None:
                return state
        if self.path.exists() or self.previous.exists():
            print("no state can be used; starting from the first epoch", flush=True)
        return None

    def finish(self, state: Mapping[str, Any]) -> None:
        """Keep the state at the end, for processes that wait for it, in place of the others.

        Raises:
            OSError: it can't be written; the states on the way are as they were.
        """
        with failures_name(self.finished):
            self._write(state).replace(self.finished)
            sync_folder(self.path.parent)
            self.discard()

    def load_finished(self) -> dict[str, Any] | None:
        """The state at the end of this very training, if it was done before."""
        return _read(self.finished)

    def discard(self) -> None:
        """Remove the states on the way."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)

    def _write(self, state: Mapping[str, Any]) -> Path:
        """A new file with the state, read back."""
        fresh = self.path.with_suffix(".fresh.pt")
        content = _packed(state)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)  # it may be a pipe, which would be waited for
            write_through(fresh, content)
            if fresh.read_bytes() != content:
                raise OSError(errno.EIO, "the disk gives back other bytes than were written")
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        return fresh


def tidy(folder: Path, *, now: float | None = None) -> None:
    """Remove what nobody will ask for: results after a day, interrupted trainings after 60 days."""
    now = time.time() if now is None else now
    for path in folder.glob("*.pt"):
        kept = KEEP_FINISHED if path.name.endswith(".finished.pt") else KEEP_INTERRUPTED
        try:
            if now - path.stat().st_mtime > kept:
                path.unlink()
        except OSError:  # another process tidies as well
            continue


def _packed(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    return hashlib.sha256(content).digest() + content


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
    except Exception as error:  # whole but not ours: torch.load raises what the bytes happen to break
        print(f"{path} is no resume point ({error}), so it is not used", flush=True)
        return None
