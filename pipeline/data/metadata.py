"""`dataset.json`, which describes a prepared folder: `prepare` writes it last, later stages read it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import read_json, truncate

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
MAX_DESCRIPTION = 16 << 20  # bytes
REMEDY = "`make repro` makes it anew, and takes a damaged copy out of DVC's cache"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SplitRecord(_Record):
    """A split whose images are in the folder, as arrays."""

    images: int
    images_sha256: str
    labels_sha256: str


class ListedRecord(_Record):
    """A split whose images the folder lists (streaming.py)."""

    images: int
    manifest_sha256: str


class Description(_Record):
    """dataset.json. Only listed splits need an image size: arrays have one."""

    source: str
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2)]
    image_size: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    splits: dict[SplitName, SplitRecord | ListedRecord]

    @model_validator(mode="after")
    def _all_of_them(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"the splits are {sorted(self.splits)}")
        listed = {isinstance(record, ListedRecord) for record in self.splits.values()}
        if listed != {self.image_size is not None}:
            raise ValueError("some splits are listed and some are not, or the image size is missing")
        return self

    @field_validator("classes", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError("the classes are no list")
        return value


def load_classes(folder: Path) -> tuple[str, ...]:
    return read_description(folder).classes


def read_description(folder: Path) -> Description:
    """What `dataset.json` of a prepared folder says.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / DESCRIPTION
    try:
        return Description.model_validate(read_json(path, MAX_DESCRIPTION))
    except ValidationError as error:
        first = error.errors()[0]
        key = truncate(".".join(map(str, first["loc"])), 80)
        raise DataError(f"{path}: {key}: {truncate(first['msg'])}; {REMEDY}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else truncate(error)
        raise DataError(f"{path} can't be read ({reason}); {REMEDY}") from None


def write_description(
    folder: Path, source: str, classes: Sequence[str], splits: Mapping[SplitName, object], **more: int
) -> None:
    """Write `dataset.json`; equal content gives equal bytes."""
    content = {"source": source, "classes": list(classes), "splits": splits, **more}
    write_text(folder / DESCRIPTION, json.dumps(content, indent=2, sort_keys=True) + "\n")
