"""What a large tree of images costs before it is trained on: `python -m research.image_tree`.

For each number of images it makes a tree of small JPEGs in 1,000 classes beside a clone of this
repository, and measures seconds and peak memory of `dvc repro prepare`, of `dvc status`, and of one
epoch of the loader. So the growth from one number to the next shows what breaks first.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_sample_images

from pipeline.data.dataset import load_split
from pipeline.data.transforms import SeededCrop
from pipeline.device import describe_machine
from pipeline.infra.atomic_io import write_text
from pipeline.report.tables import markdown_table
from tools.command import Parser, command

ROOT = Path(__file__).parents[1]
DISTINCT = 256  # pictures; the files that repeat one differ in a comment at their end
TEST_EVERY = 10  # of how many images one is a test image
BATCH = 256
PREPARED = Path("data/prepared")


def pictures(pixels: int) -> list[bytes]:
    """JPEG files of square cutouts of scikit-learn's two photographs."""
    draw = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    files = []
    for number in range(DISTINCT):
        photograph = photographs[number % len(photographs)]
        side = int(draw.integers(pixels, min(photograph.size)))
        left, top = (int(draw.integers(0, edge - side + 1)) for edge in photograph.size)
        cutout = photograph.crop((left, top, left + side, top + side)).resize((pixels, pixels))
        file = io.BytesIO()
        cutout.save(file, format="JPEG", quality=85)
        files.append(file.getvalue())
    return files


def make_tree(folder: Path, *, images: int, classes: int, pixels: int) -> None:
    """folder/train/CLASS/NUMBER.jpg and folder/test/..., evenly over the classes."""
    files = pictures(pixels)
    for split in ("train", "test"):
        for label in range(classes):
            (folder / split / f"class_{label:04}").mkdir(parents=True)
    for number in range(images):
        split = "test" if number // classes % TEST_EVERY == TEST_EVERY - 1 else "train"
        path = folder / split / f"class_{number % classes:04}" / f"{number:07}.jpg"
        path.write_bytes(files[number % DISTINCT] + f"{number:07}".encode())


def clone(folder: Path, tree: Path, pixels: int) -> None:
    """Clone this commit, with the preset for ImageNet, on that tree."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    preset = [sys.executable, "-m", "tools.preset", "imagenet_resnet101"]
    subprocess.run(preset, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (folder / "data/images").symlink_to(tree)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["data"]["image_size"], params["policy_net"]["input_size"] = pixels, pixels // 2
    yaml.dump(params, folder / "params.yaml")


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process and those it started hold; pages that they share count for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += one.memory_info().rss
    return total


def run(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds and peak memory (MiB) of a command, looked at ten times a second."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, memory_of(watched))
            time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return {"seconds": time.perf_counter() - started, "mib": peak / 2**20}


def epoch() -> None:
    """Decode every training image of the working folder once, in random order, as a training does."""
    split = load_split(PREPARED, "train", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    parts = torch.randperm(len(split), generator=generator).split(BATCH)
    crop = SeededCrop(flip=True)
    for _ in split.batches(parts, crop, crop.draw(len(split), generator)):
        pass


def measure(images: int, *, classes: int, pixels: int) -> list[dict[str, Any]]:
    """A row for each command on a tree of so many images."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        tree, folder = Path(temporary) / "tree", Path(temporary) / "clone"
        started = time.perf_counter()
        make_tree(tree, images=images, classes=classes, pixels=pixels)
        print(f"image_tree: {images:,} images in {time.perf_counter() - started:.0f} s", flush=True)
        clone(folder, tree, pixels)
        commands = {
            "dvc repro prepare": ["dvc", "repro", "-q", "prepare"],
            "dvc repro prepare, nothing to do": ["dvc", "repro", "-q", "prepare"],
            "dvc status": ["dvc", "status"],
            "one epoch of the loader": [sys.executable, "-m", "research.image_tree", "--epoch"],
        }
        for name, words in commands.items():
            row = {"images": images, "command": name} | run(words, folder)
            print(f"  {name}: {row['seconds']:.1f} s, {row['mib']:.0f} MiB", flush=True)
            rows.append(row)
        manifests = sum(path.stat().st_size for path in (folder / PREPARED).glob("*_manifest.tsv"))
        rows.append({"images": images, "command": "manifests", "mib": manifests / 2**20})
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each command, a column for each number of images, as Markdown."""
    counts = list(dict.fromkeys(row["images"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["command"] for row in rows):
        cells = [name]
        for count in counts:
            (row,) = (r for r in rows if (r["images"], r["command"]) == (count, name))
            seconds = f"{row['seconds']:.1f} s, " if "seconds" in row else ""
            cells.append(f"{seconds}{row['mib']:.0f} MiB")
        lines.append(cells)
    return markdown_table(["", *(f"{count:,} images" for count in counts)], lines)


def add_options(parser: Parser) -> None:
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--pixels", type=int, default=64, help="of a side")
    parser.add_argument("--epoch", action="store_true", help="the loader alone, in this folder")
    parser.add_argument("--out", type=Path, default=Path("results/image_tree.json"))


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    if arguments.epoch:
        epoch()
        return
    rows: list[dict[str, Any]] = []
    for images in arguments.images:
        rows += measure(images, classes=arguments.classes, pixels=arguments.pixels)
    content = {
        "machine": describe_machine(torch.device("cpu")),
        "pixels": arguments.pixels,
        "rows": rows,
    }
    write_text(arguments.out, json.dumps(content, indent=1) + "\n")
    print(f"\n{table_of(rows)}\n\nimage_tree: {arguments.out}")


if __name__ == "__main__":
    main()
