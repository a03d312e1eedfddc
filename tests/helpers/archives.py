"""What several test modules make: archives of a small CIFAR, and folders of images."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.dataset import digest
from pipeline.sources import cifar
from pipeline.sources.class_folders import scan
from pipeline.sources.image_folder import imagefolder

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
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


def pretend_cifar10(monkeypatch) -> None:
    """The small CIFAR passes for the real one, and its last four training images are validation."""
    expected = {name: digest(array) for name, array in small_cifar().items()}
    monkeypatch.setattr(cifar, "CIFAR10_DIGESTS", expected)
    monkeypatch.setattr(cifar, "CIFAR_VALIDATION", 4)


def npm_members() -> dict[str, bytes]:
    arrays = small_cifar()
    members = {
        f"package/data_batch_{n + 1}.png": png(part.reshape(2, 1024, 3))
        for n, part in enumerate(np.split(arrays["train images"], 5))
    }
    members["package/test_batch.png"] = png(arrays["test images"].reshape(3, 1024, 3))
    for kind in ("train", "test"):
        members[f"package/{kind}_lables.json"] = json.dumps(arrays[f"{kind} labels"].tolist()).encode()
    return members


def python_members(label_key: str = "labels") -> dict[str, bytes]:
    """The members of CIFAR-10's archive in Python's format, or with `fine_labels` of CIFAR-100's."""
    arrays = small_cifar()

    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return pickle.dumps({"data": planes, label_key: labels.tolist()})

    train, test = ([arrays[f"{kind} images"], arrays[f"{kind} labels"]] for kind in ("train", "test"))
    if label_key == "fine_labels":
        meta = {"fine_label_names": ["apple", "baby"]}
        members = {"meta": pickle.dumps(meta), "train": batch(*train), "test": batch(*test)}
        return {f"cifar-100-python/{name}": content for name, content in members.items()}
    parts = zip(*(np.split(array, 5) for array in train), strict=True)
    members = {f"data_batch_{n}": batch(*part) for n, part in enumerate(parts, start=1)}
    members |= {"test_batch": batch(*test), "batches.meta": pickle.dumps({"label_names": ["a", "b"]})}
    return {f"cifar-10-batches-py/{name}": content for name, content in members.items()}


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
