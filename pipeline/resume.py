"""Resume checkpoints of trainings: written atomically, found again by what the result depends on.

They lie outside DVC's outs (which DVC empties before a run) and outside the working folder of
`dvc exp run --temp` (which is deleted): in `.resume/` of the main checkout.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.locks import alone

PROJECT_MARK = ".dvc"


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
    """The place where one training keeps its state between epochs."""

    path: Path

    @classmethod
    def of(cls, stage: str, key: str) -> "ResumePoint":
        """The place for a stage's training with this key."""
        return cls(path=project_root() / ".resume" / f"{stage}-{key}.pt")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes off the same training (an orphan's, say) until this one is done."""
        waiting = f"waiting: another process is at the same training ({self.path.stem})"
        with alone(self.path.with_suffix(".lock"), waiting=waiting):
            yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the old state by a new one, so that at any moment one of them is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state, or None when there is none or it can't be read (the training then starts over)."""
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # torch.load raises what the damaged bytes happen to break
            print(f"{self.path} can't be read ({error}); starting from the first epoch")
            return None

    def discard(self) -> None:
        """Remove the state: the training is done."""
        self.path.unlink(missing_ok=True)
