"""Small trees of real images that need no network: what scikit-learn ships."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pipeline.data import streaming
from pipeline.sources import class_folders, image_folder


def write_tree(folder: Path, *, train: int = 24, test: int = 8, seed: int = 0) -> Path:
    """Crops of two photographs (JPEG and PNG, of all sizes) and scans of digits, in class folders."""
    draw = np.random.default_rng(seed)
    china, flower = load_sample_images().images
    digits = load_digits().images
    for split, count in (("train", train), ("test", test)):
        for name in ("china", "digit", "flower"):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                if name == "digit":
                    grey = (digits[draw.integers(len(digits))] * (255 / 16)).astype(np.uint8)
                    Image.fromarray(grey).resize((48, 40)).save(place / f"{index:03d}.png")
                    continue
                photo = china if name == "china" else flower
                height, width = draw.integers(40, 120, 2)
                top = draw.integers(photo.shape[0] - height)
                left = draw.integers(photo.shape[1] - width)
                image = Image.fromarray(photo[top : top + height, left : left + width])
                image.save(place / (f"{index:03d}.png" if index % 2 else f"{index:03d}.jpg"))
    return folder


def prepare(tree: Path, folder: Path, *, image_size: int) -> None:
    """What the stage `prepare` writes for a tree."""
    scanned = class_folders.scan(tree)
    splits = image_folder.imagefolder_stream(scanned, shares={"validation": 0.2}, seed=0)
    streaming.save(splits, folder, classes=scanned.classes, image_size=image_size)
