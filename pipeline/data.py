"""Prepared data sets: a few files of uint8 arrays, written by `prepare`, read by all later stages.

A prepared folder holds, for each split, `SPLIT_images.npy` [M, H, W, 3] uint8 and `SPLIT_labels.npy`
[M] uint8 or int64, and `dataset.json` with the names of the classes and a digest of every file.
Shapes: M images of a split, H and W pixels.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import UserError
from pipeline.tensors import Split

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
DESCRIPTION = "dataset.json"


class DataError(UserError):
    """Data can't be used; the message names the file, what is wrong with it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """One split: images [M, H, W, 3] uint8 and labels [M], each below the number of classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def at(self, rows: NDArray[np.int64]) -> "Arrays":
        """The images and labels of some rows."""
        return Arrays(images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its splits."""

    source: str
    classes: tuple[str, ...]
    splits: dict[SplitName, Arrays]


def digest(array: NDArray[np.generic]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def split_by_seed(
    arrays: Arrays, *, shares: dict[SplitName, float], seed: int
) -> dict[SplitName, Arrays]:
    """Draw disjoint splits of the given shares; what is left is the training split.

    Raises:
        DataError: a split would be empty.
    """
    order = np.random.default_rng(seed).permutation(len(arrays.labels))
    splits: dict[SplitName, Arrays] = {}
    start = 0
    for name, share in shares.items():
        count = math.ceil(share * len(order))
        splits[name] = arrays.at(np.sort(order[start : start + count]))
        start += count
    splits["train"] = arrays.at(np.sort(order[start:]))
    for name, split in splits.items():
        if len(split.labels) == 0:
            remedy = "lower the shares or add images" if name == "train" else "raise its share"
            raise DataError(f"the split {name} of {len(order)} images is empty; {remedy}")
    return splits


def save(dataset: Dataset, folder: Path) -> None:
    """Write the prepared folder; the same data give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "source": dataset.source,
        "classes": list(dataset.classes),
        "splits": {
            name: {
                "images": len(split.labels),
                "images_sha256": digest(split.images),
                "labels_sha256": digest(split.labels),
            }
            for name, split in sorted(dataset.splits.items())
        },
    }
    for name, split in dataset.splits.items():
        np.save(folder / f"{name}_images.npy", np.ascontiguousarray(split.images))
        np.save(folder / f"{name}_labels.npy", split.labels.astype(np.int64))
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def load_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes of a prepared folder."""
    return _description(folder).classes


def load_split(folder: Path, name: SplitName, device: torch.device) -> Split:
    """Read one split onto a device, checking shapes, types, labels and digests.

    Raises:
        DataError: a file is missing, damaged or not what `dataset.json` says.
    """
    description = _description(folder)
    arrays: dict[str, NDArray[np.generic]] = {}
    for kind in ("images", "labels"):
        path = folder / f"{name}_{kind}.npy"
        try:
            arrays[kind] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError, TokenError) as error:
            raise DataError(f"{path} can't be read ({error}); {_REMEDY}") from None
        if digest(arrays[kind]) != getattr(description.splits[name], f"{kind}_sha256"):
            raise DataError(f"{path} is not what {DESCRIPTION} beside it says; {_REMEDY}")
    images, labels = arrays["images"], arrays["labels"]
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    typed = images.dtype == np.uint8 and labels.dtype == np.int64
    if not typed or not square or labels.shape != (len(images),) or not len(labels):
        raise DataError(
            f"{folder / name}_*.npy hold {images.dtype} {images.shape} and labels {labels.dtype} "
            f"{labels.shape}, expected uint8 [M, S, S, 3] and int64 [M]; {_REMEDY}"
        )
    if labels.min() < 0 or labels.max() >= len(description.classes):
        raise DataError(f"{folder / name}_labels.npy has labels outside the classes; {_REMEDY}")
    return Split(images=torch.from_numpy(images).to(device), labels=torch.from_numpy(labels).to(device))


_REMEDY = "make it anew with `dvc repro -f prepare`"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _SplitRecord(_Record):
    images: int
    images_sha256: str
    labels_sha256: str


class _Description(_Record):
    """dataset.json."""

    source: str
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2)]
    splits: dict[SplitName, _SplitRecord]

    @field_validator("splits")
    @classmethod
    def _all_of_them(cls, value: dict[SplitName, _SplitRecord]) -> dict[SplitName, _SplitRecord]:
        if set(value) != set(SPLITS):
            raise ValueError(f"the splits are {sorted(value)}")
        return value

    @field_validator("classes", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError("the classes are no list")
        return value


def _description(folder: Path) -> _Description:
    path = folder / DESCRIPTION
    try:
        return _Description.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read ({error}); {_REMEDY}") from None
