"""Prepared data sets on disk: arrays that `prepare` writes and all later stages read.

A prepared folder holds, for each split, `SPLIT_images.npy` [M, H, W, 3] uint8 and `SPLIT_labels.npy`
[M] int64, and `dataset.json` with the names of the classes and a digest of every array. Images that do
not fit into the memory are only listed there (streaming.py).
Shapes: M images of a split, H and W pixels.
"""

import hashlib
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.metadata import (
    DESCRIPTION,
    REMEDY,
    Description,
    ListedRecord,
    SplitName,
    read_description,
    write_description,
)
from pipeline.data.split import ImageSplit, Split
from pipeline.data.streaming import StreamedSplit, read_manifest
from pipeline.infra.atomic_io import write_atomically
from pipeline.infra.errors import DataError
from pipeline.infra.resume import project_root
from pipeline.infra.safe_io import open_regular, truncate

IMAGES = Path("data/images")  # in the project's root: a folder, or a link to one, that DVC leaves alone


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """One split: images [M, H, W, 3] uint8 and labels [M], each below the number of classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> "Arrays":
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
    """Draw disjoint splits of the given shares at random; all other images are the training split.

    Raises:
        DataError: a split would be empty.
    """
    splits = split_rows(len(arrays.labels), shares=shares, seed=seed)
    return {name: arrays.take(rows) for name, rows in splits.items()}


def split_rows(
    images: int, *, shares: dict[SplitName, float], seed: int
) -> dict[SplitName, NDArray[np.int64]]:
    """The row numbers of each split, ascending, as `split_by_seed` draws them.

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
    described = {}
    for name, split in dataset.splits.items():
        _write_array(folder / f"{name}_images.npy", split.images)
        _write_array(folder / f"{name}_labels.npy", split.labels.astype(np.int64))
        described[name] = {
            "images": len(split.labels),
            "images_sha256": digest(split.images),
            "labels_sha256": digest(split.labels),
        }
    write_description(folder, dataset.source, dataset.classes, described)


def _write_array(path: Path, array: NDArray[np.generic]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    write_atomically(path, buffer.getvalue())


def load_split(folder: Path, name: SplitName, device: torch.device) -> ImageSplit:
    """Read one split onto a device, checking shapes, types, labels and digests.

    A split that `prepare` only listed is read as it is needed, from `data/images`.

    Raises:
        DataError: a file is missing, damaged or not what `dataset.json` says.
    """
    description = read_description(folder)
    record = description.splits[name]
    if isinstance(record, ListedRecord):
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
    path: Path, description: Description, record: ListedRecord, device: torch.device
) -> ImageSplit:
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
    """An array as np.save writes it, in C order: its digest is that of all bytes after the header.

    A damaged header takes no memory: its size must be that of the file.
    """
    try:
        with open_regular(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is of another version of the format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            expected = math.prod(shape) * dtype.itemsize
            actual = os.fstat(file.fileno()).st_size - start
            if fortran or expected != actual:
                raise ValueError(
                    f"its header says {expected:,} bytes of {dtype}, and it holds {actual:,}"
                )
            genuine = hashlib.file_digest(file, "sha256").hexdigest() == sha256  # takes no memory
            file.seek(start)
            array = np.fromfile(file, dtype).reshape(shape) if genuine else None
    except Exception as error:  # numpy raises what the damaged bytes of a header happen to break
        reason = error.strerror if isinstance(error, OSError) else truncate(error)
        raise DataError(f"{path} can't be read ({reason}); {REMEDY}") from None
    if array is None:
        raise DataError(f"{path} is not what {DESCRIPTION} beside it says; {REMEDY}")
    return array
