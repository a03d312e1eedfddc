"""Classify image files: `python -m tools.predict cat.png dog.jpg`.

Prints each image's class and confidence, the ResNet's blocks that ran, and the FLOPs that this saves.
An image of any size is cropped to its middle square and scaled, as the source `imagefolder` does it.
"""

import argparse
import glob
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.device import choose_device
from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import printable
from pipeline.models import checkpoint
from pipeline.serving.predictor import Prediction, Predictor
from pipeline.sources.image_folder import read_image
from tools.command import Parser, command

MODEL = "models/finetune"
REGISTRY = "models:/"
COLUMNS = ("image", "class", "confidence", "blocks", "kept", "FLOPs", "saved")
IN_NUMBERS = COLUMNS[2:3] + COLUMNS[4:]
SHOWN = 5  # names in a warning
UNLIMITED = 10**6  # characters of a line
REMEDIES = "`make repro` trains one, pretrained/finetune is one for CIFAR-10"


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    """The checkpoint folder that a command line names, for as long as the context lasts.

    Raises:
        UserError: there is no such folder, or no such model in MLflow.
    """
    if model.startswith(REGISTRY):
        from pipeline.tracking.registry import fetched  # slow to import

        with fetched(model) as folder:
            yield folder
        return
    folder = Path(model)
    if folder.name in (checkpoint.WEIGHTS, checkpoint.SIDECAR):  # named by a file in it
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{model} is no folder with a trained model; {REMEDIES}; `--model` names one")
    yield folder


def paths_of(words: str) -> list[Path]:
    """The files that the text of `--words` names.

    Raises:
        UserError: a quotation mark has no partner.
    """
    if exists(words):
        return [Path(words)]
    try:
        split = shlex.split(words)
    except ValueError:
        raise UserError(
            f"IMAGES={words}: a quotation mark has no partner; write a name that holds one alone, or in "
            "the other kind of marks"
        ) from None
    return [Path(name) for word in split for name in matches(word)]


def exists(name: str) -> bool:
    """Whether a file has that name; no file has a name that is too long for the system."""
    try:
        return bool(name) and Path(name).exists()
    except OSError:
        return False


def matches(word: str) -> list[str]:
    """The files that a pattern matches; the word itself where it names a file, or matches nothing."""
    return [word] if exists(word) else sorted(glob.glob(word)) or [word]  # noqa: PTH207


def read(paths: Sequence[Path], image_size: int) -> tuple[list[Path], NDArray[np.uint8], list[str]]:
    """Paths of the images that can be read, the images [B, S, S, 3], and an error for each other one."""
    readable, images, errors = [], [], []
    for path in paths:
        try:
            images.append(read_image(path, image_size))
            readable.append(path)
        except UserError as error:
            errors.append(str(error))
    stacked = np.stack(images) if images else np.empty((0, image_size, image_size, 3), dtype=np.uint8)
    return readable, stacked, errors


def cells(path: Path, prediction: Prediction) -> tuple[str, ...]:
    return (
        printable(path),
        printable(prediction.name),
        f"{100 * prediction.confidence:.1f} %",
        prediction.pattern,
        f"{prediction.blocks}/{len(prediction.kept_blocks)}",
        f"{prediction.flops:.3g}",
        f"{100 * prediction.flops_saved:.1f} %",
    )


def show(paths: Sequence[Path], predictions: Sequence[Prediction]) -> None:
    """Print a table, cut to no width where there is no terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in IN_NUMBERS else "left", overflow="fold")
    for pair in zip(paths, predictions, strict=True):
        table.add_row(*map(Text, cells(*pair)))  # Text: a name may hold brackets
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)


def show_json(paths: Sequence[Path], predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    """Print one JSON object a line; probabilities by the names of the classes."""
    for path, prediction in zip(paths, predictions, strict=True):
        record = {"image": str(path)} | prediction.record()
        record["probabilities"] = dict(zip(classes, record["probabilities"], strict=True))
        print(json.dumps(record, ensure_ascii=False))


def warn_of_unlike(paths: Sequence[Path], unlike: NDArray[np.bool_] | None) -> None:
    """Name the images that are unlike those of the training, if the checkpoint can tell."""
    if unlike is None:
        return
    names = [printable(path) for path, is_unlike in zip(paths, unlike, strict=True) if is_unlike]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(
            "warning: unlike the images of the training, so that the class says little: "
            f"{', '.join(names[:SHOWN])}{more}",
            file=sys.stderr,
        )


def add_options(parser: Parser) -> None:
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--words",
        default="",
        help="IMAGES of `make predict`: one name, or several with blanks between them, those that hold\n"
        "blanks in quotation marks; a pattern (photos/*.png) stands for what it matches",
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help=f"a checkpoint folder ({MODEL}), models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID",
    )
    parser.add_argument("--image-size", type=int, help="for a checkpoint that does not say it")
    parser.add_argument("--gamma", type=float, help="of a policy between paths; larger: more blocks")
    parser.add_argument(
        "--budget", type=float, help="in its place: 0.4 is 40 %% of the full ResNet's FLOPs on average"
    )
    parser.add_argument("--json", action="store_true", help="one object a line")


@command(add_options, intermixed=True)
def main(arguments: argparse.Namespace) -> None:
    """Predict all images that can be read; exit with status 1 if there are others."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    named = [*arguments.images, *paths_of(arguments.words)]
    if not named:
        raise UserError("no image is named; `make predict IMAGES=\"a.png 'b c.png'\"` names two")
    with folder_of(arguments.model) as folder:
        loaded = checkpoint.load(folder)
    predictor = Predictor(
        loaded,
        image_size=arguments.image_size,
        device=choose_device(),
    )
    gamma = predictor.gamma_of(gamma=arguments.gamma, budget=arguments.budget)
    paths, images, errors = read(named, predictor.image_size)
    predictions = predictor(images, gamma=gamma)
    if arguments.json:
        show_json(paths, predictions, predictor.classes)
    elif predictions:
        show(paths, predictions)
        warn_of_unlike(paths, predictor.unlike_training(images))
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
