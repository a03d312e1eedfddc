"""How well images unlike the training's are told: `python -m research.unlike MODEL`.

Beside the test images of data/prepared stand scikit-learn's digits and crops of its two photographs,
noise, plain colours, and the test images upside down or as negatives.

Shapes: M images.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pipeline.data.dataset import load_split
from pipeline.device import choose_device
from pipeline.report.tables import markdown_table
from pipeline.serving.demo import UNSURE
from pipeline.serving.image_classifier import ImageClassifier
from stages.support import common
from tools.command import Parser, command

COUNT = 500
SMALLEST_CROP = 64  # pixels


def digits(size: int) -> NDArray[np.uint8]:
    grey = (load_digits().images[:COUNT] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image).convert("RGB").resize((size, size)) for image in grey]
    return np.stack([np.asarray(image) for image in images])


def photo_crops(size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    crops = []
    for number in range(COUNT):
        photo = load_sample_images().images[number % 2]
        side = int(generator.integers(SMALLEST_CROP, min(photo.shape[:2])))
        top, left = (int(generator.integers(0, extent - side)) for extent in photo.shape[:2])
        crop = Image.fromarray(photo[top : top + side, left : left + side])
        crops.append(np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(crops)


def image_sets(folder: Path, size: int) -> dict[str, NDArray[np.uint8]]:
    """The images [M, size, size, 3] of each kind."""
    generator = np.random.default_rng(0)
    test = np.concatenate(
        [b.cpu().numpy() for b in load_split(folder, "test", choose_device()).iter_batches(500)]
    )
    plain = generator.integers(0, 256, (COUNT, 1, 1, 3), dtype=np.uint8)
    return {
        "test images": test,
        "test images, upside down": test[:COUNT, ::-1].copy(),
        "test images, negatives": 255 - test[:COUNT],
        "photo crops": photo_crops(size, generator),
        "digits": digits(size),
        "noise": generator.integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8),
        "plain colours": np.broadcast_to(plain, (COUNT, size, size, 3)).copy(),
    }


def add_options(parser: Parser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint folder")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    classifier = ImageClassifier.load(arguments.model)
    rows = []
    for name, images in image_sets(common.PREPARED, classifier.image_size).items():
        unlike = classifier.unlike_training(images)
        confidence = np.array([prediction.confidence for prediction in classifier(images)])
        told = "-" if unlike is None else f"{100 * unlike.mean():.1f} %"
        rows.append([name, len(images), told, f"{100 * (confidence < UNSURE).mean():.1f} %"])
    print(
        markdown_table(["images", "n", "called unlike", f"confidence under {100 * UNSURE:.0f} %"], rows)
    )


if __name__ == "__main__":
    main()
