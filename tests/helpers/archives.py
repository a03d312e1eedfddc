"""What several test modules make: archives."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.sources.class_folders import scan
from pipeline.sources.image_folder import imagefolder

SIZE = 8


SHARES = {"validation": 0.25, "test": 0.25}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def small_cifar() -> dict[str, np.ndarray]:
    """Five batches of two training images and three test images, as [M, 32, 32, 3] and labels."""
    draw = np.random.default_rng(0)
    return {
        "train images": draw.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        "train labels": np.arange(10, dtype=np.uint8),
        "test images": draw.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        "test labels": np.array([9, 5, 0], dtype=np.uint8),
    }


def npm_members() -> dict[str, bytes]:
    arrays = small_cifar()
    members = {
        f"package/data_batch_{number + 1}.png": png(
            arrays["train images"][2 * number : 2 * number + 2].reshape(2, 1024, 3)
        )
        for number in range(5)
    }
    members["package/test_batch.png"] = png(arrays["test images"].reshape(3, 1024, 3))
    for kind in ("train", "test"):
        members[f"package/{kind}_lables.json"] = json.dumps(arrays[f"{kind} labels"].tolist()).encode()
    return members


def plain(colour=(255, 0, 0), size=(12, 12)) -> Image.Image:
    return Image.new("RGB", size, colour)


def put(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(folder: Path, *, classes=("cat", "dog"), count: int = 8) -> Path:
    for brightness, name in enumerate(classes, start=1):
        for number in range(count):
            put(plain((40 * brightness, number, 0)), folder / name / f"{number}.png")
    return folder


def read(folder: Path, shares=SHARES):
    return imagefolder(scan(folder), image_size=SIZE, shares=shares, seed=0)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
