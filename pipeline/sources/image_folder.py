"""Folders of images as data sets: read into memory (imagefolder), or only listed (imagefolder_stream).

class_folders.py says which files belong to which split and class. A file, class or share at fault is
named by a DataError.
"""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from tqdm import tqdm

from pipeline.data.dataset import Arrays, Dataset, split_by_seed, split_rows
from pipeline.data.image_io import BILINEAR, open_image
from pipeline.data.metadata import SplitName
from pipeline.data.streaming import Listing
from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import open_regular
from pipeline.sources.class_folders import Labelled, Tree, some


def imagefolder(tree: Tree, *, image_size: int, shares: dict[SplitName, float], seed: int) -> Dataset:
    """Images of any size and kind, as squares of `image_size`; splits without a folder are drawn.

    Raises:
        DataError: the tree and the shares don't fit together, or an image can't be read.
    """
    tree.check(shares)
    splits = {name: _read(name, images, image_size) for name, images in tree.splits.items()}
    splits.update(split_by_seed(splits.pop("train"), shares=shares, seed=seed))
    _require_every_class(splits["train"].labels, tree.classes)
    return Dataset(source="imagefolder", classes=tree.classes, splits=splits)


def imagefolder_stream(
    tree: Tree, *, shares: dict[SplitName, float], seed: int
) -> dict[SplitName, Listing]:
    """The images of each split, listed and not decoded: for trees of any size.

    Raises:
        DataError: the tree and the shares don't fit together, or a file is missing, empty or misnamed.
    """
    tree.check(shares)
    splits = {name: _list(name, images, tree.folder) for name, images in tree.splits.items()}
    whole = splits.pop("train")
    for name, rows in split_rows(len(whole.paths), shares=shares, seed=seed).items():
        splits[name] = Listing(
            paths=[whole.paths[row] for row in rows], labels=whole.labels[rows], sizes=whole.sizes[rows]
        )
    _require_every_class(splits["train"].labels, tree.classes)
    return splits


def _require_every_class(labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    without = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if without:
        raise DataError(
            f"no image to train on is left of {some(without)} when the other splits are drawn; add "
            "images of it, remove the class, or set another data.split_seed"
        )


def _read(split: str, images: Labelled, image_size: int) -> Arrays:
    bar = tqdm(images, desc=split, unit="image", disable=None)
    pixels = np.stack([read_image(path, image_size) for path, _ in bar])
    return Arrays(images=pixels, labels=np.asarray([label for _, label in images], dtype=np.int64))


def _list(split: str, images: Labelled, root: Path) -> Listing:
    paths, sizes = [], []
    for path, _ in tqdm(images, desc=split, unit="image", disable=None):
        name = path.relative_to(root).as_posix()
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise DataError(f"{name!r} can't stand in a manifest; rename it in UTF-8")
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); repair or remove it") from None
        if size == 0:
            raise DataError(f"{path} is empty; repair or remove it")
        paths.append(name)
        sizes.append(size)
    labels = np.asarray([label for _, label in images], dtype=np.int64)
    return Listing(paths=paths, labels=labels, sizes=np.asarray(sizes, dtype=np.int64))


def read_image(path: Path, image_size: int) -> NDArray[np.uint8]:
    """An upright RGB square: the shorter side resized to `image_size`, the longer one cropped to it.

    Raises:
        DataError: the file is missing or damaged, no image, or one whose brightness has no known range.
    """
    return np.asarray(ImageOps.fit(open_image(path), (image_size,) * 2, BILINEAR))
