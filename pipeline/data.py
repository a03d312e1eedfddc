"""Prepared data sets: a few files of uint8 arrays, written by `prepare`, read by all later stages.

A prepared folder holds, for each split, `SPLIT_images.npy` [M, H, W, 3] uint8 and `SPLIT_labels.npy`
[M] int64, and `dataset.json` with the names of the classes and a digest of every file. For images that
do not fit into the memory it holds lists of them instead (streaming.py).
Shapes: M images of a split, H and W pixels.
"""

import hashlib
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import UserError
from pipeline.files import write_atomically, write_text
from pipeline.resume import project_root
from pipeline.tensors import Images, Split
from pipeline.untrusted import cut, open_regular, read_json

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
IMAGES = Path("data/images")  # in the project's root: a folder, or a link to one, that DVC leaves alone
MAX_DESCRIPTION = 16 << 20  # bytes


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
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def split_by_seed(
    arrays: Arrays, *, shares: dict[SplitName, float], seed: int
) -> dict[SplitName, Arrays]:
    """Draw disjoint splits of the given shares; what is left is the training split.

    Raises:
        DataError: a split would be empty.
    """
    drawn = split_rows(len(arrays.labels), shares=shares, seed=seed)
    return {name: arrays.at(rows) for name, rows in drawn.items()}


def split_rows(
    images: int, *, shares: dict[SplitName, float], seed: int
) -> dict[SplitName, NDArray[np.int64]]:
    """The rows of each split, in their order, as `split_by_seed` draws them.

    Raises:
        DataError: a split would be empty.
    """
    order = np.random.default_rng(seed).permutation(images)
    splits: dict[SplitName, NDArray[np.int64]] = {}
    start = 0
    for name, share in shares.items():
        count = math.ceil(share * len(order))
        splits[name] = np.sort(order[start : start + count])
        start += count
    splits["train"] = np.sort(order[start:])
    for name, split in splits.items():
        if len(split) == 0:
            remedy = "lower the shares or add images" if name == "train" else "raise its share"
            raise DataError(f"the split {name} of {len(order)} images is empty; {remedy}")
    return splits


def save(dataset: Dataset, folder: Path) -> None:
    """Write the prepared folder; the same data give the same bytes.

    The description comes last and holds the digests of the arrays, so a folder in which only some files
    are new is refused by `load_split`.
    """
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
        _write_array(folder / f"{name}_images.npy", split.images)
        _write_array(folder / f"{name}_labels.npy", split.labels.astype(np.int64))
    write_text(folder / DESCRIPTION, json.dumps(description, indent=2, sort_keys=True) + "\n")


def _write_array(path: Path, array: NDArray[np.generic]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    write_atomically(path, buffer.getvalue())


def load_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes of a prepared folder."""
    return _description(folder).classes


def load_split(folder: Path, name: SplitName, device: torch.device) -> Images:
    """Read one split onto a device, checking shapes, types, labels and digests.

    A split that `prepare` only listed is read as it is needed, from `data/images`.

    Raises:
        DataError: a file is missing, damaged or not what `dataset.json` says.
    """
    description = _description(folder)
    record = description.splits[name]
    if isinstance(record, _ListedRecord):
        return _streamed(folder / f"{name}_manifest.tsv", description, record, device)
    images = _read_array(folder / f"{name}_images.npy", record.images_sha256)
    labels = _read_array(folder / f"{name}_labels.npy", record.labels_sha256)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    typed = images.dtype == np.uint8 and labels.dtype == np.int64
    counted = len(images) == record.images > 0
    if not typed or not square or not counted or labels.shape != (record.images,):
        raise DataError(
            f"{folder / name}_*.npy hold {images.dtype} {images.shape} and labels {labels.dtype} "
            f"{labels.shape}, expected uint8 [M, S, S, 3] and int64 [M] with M = {record.images}; "
            f"{REMEDY}"
        )
    if labels.min() < 0 or labels.max() >= len(description.classes):
        raise DataError(f"{folder / name}_labels.npy has labels outside the classes; {REMEDY}")
    return Split(images=torch.from_numpy(images).to(device), labels=torch.from_numpy(labels).to(device))


def _streamed(
    path: Path, description: "_Description", record: "_ListedRecord", device: torch.device
) -> Images:
    from pipeline.streaming import StreamedSplit, read_manifest  # it imports this module

    assert description.image_size is not None  # as its validator has seen
    listing = read_manifest(
        path, sha256=record.manifest_sha256, images=record.images, classes=len(description.classes)
    )
    root = project_root() / IMAGES
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder, and {path} lists its images; link it there (docs/imagenet.md)"
        )
    return StreamedSplit(root, listing, image_size=description.image_size, device=device)


def _read_array(path: Path, sha256: str) -> NDArray[np.generic]:
    """An array as np.save writes it; memory is taken once the file is as large as its header says.

    In C order, so that the digest of the array is the digest of the file's rest.
    """
    try:
        with open_regular(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is of another version of the format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            promised = math.prod(shape) * dtype.itemsize
            held = os.fstat(file.fileno()).st_size - file.tell()
            if fortran or promised != held:
                raise ValueError(f"its header says {promised:,} bytes of {dtype}, and it holds {held:,}")
            start = file.tell()
            genuine = hashlib.file_digest(file, "sha256").hexdigest() == sha256  # takes no memory
            file.seek(start)
            array = np.fromfile(file, dtype).reshape(shape) if genuine else None
    except Exception as error:  # numpy raises what the damaged bytes of a header happen to break
        said = error.strerror if isinstance(error, OSError) else cut(error)
        raise DataError(f"{path} can't be read ({said}); {REMEDY}") from None
    if array is None:
        raise DataError(f"{path} is not what {DESCRIPTION} beside it says; {REMEDY}")
    return array


REMEDY = "make it anew with `dvc repro -f prepare`"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _SplitRecord(_Record):
    images: int
    images_sha256: str
    labels_sha256: str


class _ListedRecord(_Record):
    images: int
    manifest_sha256: str


class _Description(_Record):
    """dataset.json. Splits that are listed and not copied have an image size, as arrays have theirs."""

    source: str
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2)]
    image_size: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    splits: dict[SplitName, _SplitRecord | _ListedRecord]

    @model_validator(mode="after")
    def _all_of_them(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"the splits are {sorted(self.splits)}")
        listed = {isinstance(record, _ListedRecord) for record in self.splits.values()}
        if listed != {self.image_size is not None}:
            raise ValueError("some splits are listed and some are not, or the image size is missing")
        return self

    @field_validator("classes", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError("the classes are no list")
        return value


def _description(folder: Path) -> _Description:
    path = folder / DESCRIPTION
    try:
        return _Description.model_validate(read_json(path, MAX_DESCRIPTION))
    except ValidationError as error:
        first = error.errors()[0]
        where = cut(".".join(map(str, first["loc"])), 80)
        raise DataError(f"{path}: {where}: {cut(first['msg'])}; {REMEDY}") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else cut(error)
        raise DataError(f"{path} can't be read ({said}); {REMEDY}") from None
