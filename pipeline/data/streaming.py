"""Image folders that do not fit into the memory: data/prepared lists them, stages decode them.

`prepare` writes for each split `SPLIT_manifest.tsv` with a line for each image (label, bytes, path below
data/images) and `dataset.json` with the manifests' digests. Later stages decode the images when they
need them, in worker processes that run ahead of the device.

An image's augmentation depends on one seed drawn for it in that epoch (SeededCrop). So it depends
neither on the worker that decodes it, nor on how many there are, nor on where a training was resumed.
Shapes: B images of a batch, M images of a split, S pixels of a side.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.image_io import open_image
from pipeline.data.metadata import DESCRIPTION, REMEDY, SplitName, write_description
from pipeline.data.split import Split
from pipeline.data.transforms import AnyAugmentation, SeededCrop
from pipeline.device import loader_workers
from pipeline.infra.atomic_io import write_atomically
from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import read_bytes, truncate

SOURCE = "imagefolder_stream"
MAX_MANIFEST = 1 << 30  # bytes; ImageNet's has 60 MB
RESIZED = 256 / 224  # the shorter side before the central crop, in crops: torchvision's evaluation
PREFETCH = 4  # batches that each worker decodes ahead
CACHE_FRACTION = 1 / 8  # of the memory: a split that takes no more is kept decoded for evaluation
NO_AUGMENTATION = -1  # in place of a seed


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a split, M of them."""

    paths: Sequence[str]  # below the folder of all images, with `/`
    labels: NDArray[np.int64]  # [M]
    sizes: NDArray[np.int64]  # [M], bytes of each file


def save(
    splits: dict[SplitName, Listing], folder: Path, *, classes: Sequence[str], image_size: int
) -> None:
    """Write the manifests, then the description with their digests; equal trees give equal bytes."""
    described = {}
    for name, listing in sorted(splits.items()):
        rows = zip(listing.labels.tolist(), listing.sizes.tolist(), listing.paths, strict=True)
        text = "".join(f"{label}\t{size}\t{path}\n" for label, size, path in rows)
        content = text.encode()
        write_atomically(folder / f"{name}_manifest.tsv", content)
        digest = hashlib.sha256(content).hexdigest()
        described[name] = {"images": len(listing.paths), "manifest_sha256": digest}
    write_description(folder, SOURCE, classes, described, image_size=image_size)


def read_manifest(path: Path, *, sha256: str, images: int, classes: int) -> Listing:
    """One split's manifest.

    Raises:
        DataError: it is missing, or not what the description says.
    """
    try:
        content = read_bytes(path, MAX_MANIFEST)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"it is not what {DESCRIPTION} beside it says")
        lines = content.decode().removesuffix("\n").split("\n")  # splitlines() ends lines at U+2028 too
        rows = [line.split("\t") for line in lines]
        paths = [row[2] for row in rows if len(row) == 3]
        if not len(paths) == len(rows) == images > 0:
            raise ValueError(f"it lists {len(paths)} images in {len(rows)} lines, expected {images}")
        labels = np.array([int(row[0]) for row in rows], dtype=np.int64)
        sizes = np.array([int(row[1]) for row in rows], dtype=np.int64)
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError("it has labels outside the classes")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in paths):
            raise ValueError("it has a path that leaves the folder of the images")
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else truncate(error)
        raise DataError(f"{path} can't be read ({reason}); {REMEDY}") from None
    return Listing(paths=paths, labels=labels, sizes=sizes)


Item = tuple[int, int, bool]  # row, seed of its augmentation or NO_AUGMENTATION, may be mirrored


class Reader(Dataset[Tensor | str]):
    """Decodes images of a listing, in a worker or in this process.

    For a file that can't be read it returns the message: a worker's exception would reach the user with
    the worker's traceback.
    """

    def __init__(self, root: Path, listing: Listing, image_size: int) -> None:
        from torchvision.transforms import v2  # here, so that the processes need not import it each

        self.root = root
        # not a list: processes would copy its pages as they count references
        self.paths = np.array([path.encode() for path in listing.paths])
        self.sizes = listing.sizes
        crop = v2.RandomResizedCrop(image_size, antialias=True)
        self.augment = {False: crop, True: v2.Compose([crop, v2.RandomHorizontalFlip()])}
        scaled = v2.Resize(round(image_size * RESIZED), antialias=True)
        self.centre = v2.Compose([scaled, v2.CenterCrop(image_size)])

    def __getitem__(self, item: Item) -> Tensor | str:
        """[S, S, 3] uint8, or what is wrong with the file."""
        row, seed, flip = item
        path = self.root / self.paths[row].decode()
        try:
            image: Any = open_image(path, size=int(self.sizes[row]))
        except DataError as error:
            return str(error)
        if seed == NO_AUGMENTATION:
            image = self.centre(image)
        else:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.manual_seed(seed)
                image = self.augment[flip](image)
        return torch.from_numpy(np.array(image))


def collate(items: list[Tensor | str]) -> Tensor | str:
    """A batch [B, S, S, 3], or the message on the first image that can't be read."""
    message = next((item for item in items if isinstance(item, str)), None)
    return message or torch.stack([item for item in items if isinstance(item, Tensor)])


class _Plan:
    """The rows and seeds of the next pass: the loader's batch sampler, as its workers outlive a pass."""

    def __init__(self) -> None:
        self.parts: Sequence[Tensor] = ()
        self.seeds: Tensor | None = None
        self.flip = False

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[Item]]:
        for rows in self.parts:
            if self.seeds is None:
                yield [(row, NO_AUGMENTATION, False) for row in rows.tolist()]
            else:
                seeds = self.seeds[rows].tolist()
                yield [(row, seed, self.flip) for row, seed in zip(rows.tolist(), seeds, strict=True)]


def _ignore_signals(_: int) -> None:
    """Leave signals to the process that reads, which ends these by itself.

    A terminal's Ctrl-C and torchrun's signals go to the whole process group.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StreamedImages:
    """An ImageArray that decodes each image when it is read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        image = self.reader[int(row), NO_AUGMENTATION, False]
        if isinstance(image, str):
            raise DataError(image)
        return image.numpy()


class StreamedSplit:
    """An ImageSplit (split.py) whose images are decoded when they are needed.

    Args:
        root: the folder of all images.
        device: of the batches and labels.
        workers: processes that decode; 0: this process does.
    """

    def __init__(
        self,
        root: Path,
        listing: Listing,
        *,
        image_size: int,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self.reader = Reader(root, listing, image_size)
        self.image_size = image_size
        self.device = device
        self.labels = torch.from_numpy(listing.labels).to(device)
        self._plan = _Plan()
        count = loader_workers(device) if workers is None else workers
        self._loader: DataLoader[Tensor | str] = DataLoader(
            self.reader,
            batch_sampler=self._plan,
            num_workers=count,
            prefetch_factor=PREFETCH if count else None,
            persistent_workers=count > 0,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it draws from the global one
        )
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        parts: Sequence[Tensor],
        augmentation: AnyAugmentation | None = None,
        augmentation_state: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The images of each part's rows, [B, S, S, 3] uint8; `augmentation_state` [M, 1] are seeds."""
        # with several processes, one may have no rows of a small batch; DataLoader takes no empty batch
        self._plan.parts = [rows.cpu() for rows in parts if len(rows)]
        self._plan.seeds = None
        if augmentation is not None:
            assert isinstance(augmentation, SeededCrop)
            assert augmentation_state is not None
            self._plan.seeds, self._plan.flip = augmentation_state[:, 0].cpu(), augmentation.flip
        loaded = iter(self._loader)
        for rows in parts:
            if len(rows) == 0:
                shape = (0, self.image_size, self.image_size, 3)
                yield torch.empty(shape, dtype=torch.uint8, device=self.device)
                continue
            images = next(loaded)
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True)

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """All images without augmentation, `size` at a time; decoded once, where they can be cached."""
        parts = torch.arange(len(self)).split(size)
        if self._cache is None and self._fits_cache():
            cache = torch.empty(len(self), self.image_size, self.image_size, 3, dtype=torch.uint8)
            for rows, images in zip(parts, self.batches(parts), strict=True):
                cache[rows] = images.cpu()
            self._cache = cache
        if self._cache is None:
            yield from self.batches(parts)
        else:
            yield from (images.to(self.device) for images in self._cache.split(size))

    def _fits_cache(self) -> bool:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return len(self) * self.image_size**2 * 3 <= CACHE_FRACTION * memory

    def subset(self, count: int) -> Split:
        """At most `count` images, evenly spaced over all of them and so over the classes."""
        rows = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()
        images = torch.cat(list(self.batches(rows.split(256))))
        return Split(images=images, labels=self.labels[rows.to(self.device)])

    def image_array(self) -> StreamedImages:
        """The images for figures, which read few of them."""
        return StreamedImages(self.reader)
