"""One image of any kind and size, and a checkpoint folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_split, pair_between_paths, set_dial, small_pair
from PIL import Image

from pipeline.infra.errors import DataError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.serving.image_classifier import ImageClassifier
from pipeline.serving.predictor import PredictionError

SIZE = 16
CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def networks() -> Checkpoint:
    return replace(small_pair(classes=CLASSES, image_size=SIZE), path=Path("models/finetune"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_split(20, size=SIZE).images


def same(predictions, expected) -> bool:
    return [p.record() for p in predictions] == [p.record() for p in expected]


@pytest.fixture
def between_paths(networks, images) -> ImageClassifier:
    """Of a policy between paths; its dial is as fitting it would make it."""
    pair = pair_between_paths(images)
    predictor = ImageClassifier(replace(networks, **pair))
    set_dial(pair["policy_net"].path_values, full_flops=predictor.cost.full)
    return predictor


def test_folder_and_image_are_all_that_is_needed(networks, images, tmp_path):
    checkpoint.save(networks, tmp_path / "mine")
    predictor = ImageClassifier.load(str(tmp_path / "mine"))
    pixels = images[0].numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (expected,) = ImageClassifier(networks)(images[:1])
    for given in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png"), pixels):
        assert same([predictor.classify(given)], [expected])


def test_image_of_another_size_is_cropped_to_its_middle_and_scaled(networks, images):
    predictor = ImageClassifier(networks)
    square = images[0].numpy().repeat(2, axis=0).repeat(2, axis=1)  # [32, 32, 3]
    wide = np.pad(square, ((0, 0), (8, 8), (0, 0)))
    cropped, whole = (predictor.classify(image).probabilities for image in (wide, square))
    assert cropped == pytest.approx(whole, abs=0.005)  # scaling sees the pixels beside the crop's edge
    grey = square[..., 0]
    assert same([predictor.classify(grey)], [predictor.classify(np.stack([grey] * 3, axis=2))])


def test_gamma_and_budget_are_given_with_the_image(between_paths, images):
    pixels = [image.numpy() for image in images]
    gamma = between_paths.gamma_of(budget=0.6)
    for image, expected in zip(pixels, between_paths(images, gamma=gamma), strict=True):
        prediction = between_paths.classify(image, budget=0.6)
        assert prediction.kept_blocks.tolist() == expected.kept_blocks.tolist()
        assert prediction.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    fewest, most = (sum(between_paths.classify(i, gamma=g).blocks for i in pixels) for g in (0.0, 1e9))
    assert fewest < most
    with pytest.raises(PredictionError, match=r"budget 0\.95 is out of this model's reach"):
        between_paths.classify(pixels[0], budget=0.95)


def test_what_is_no_image_is_refused_with_the_remedy(networks, tmp_path):
    predictor = ImageClassifier(networks)
    for given, message in [
        (
            np.zeros((1, 16, 16, 3), np.uint8),
            r"uint8 \(1, 16, 16, 3\).*call the predictor itself for a batch",
        ),
        (np.zeros((16, 16, 3)), r"float64 \(16, 16, 3\), expected .*uint8, colours 0 to 255"),
        (Image.new("RGBA", (16, 16)), r"mode is RGBA; give image\.convert\('RGB'\)"),
        (Image.new("F", (16, 16)), "mode is F; give"),
    ]:
        with pytest.raises(PredictionError, match=message):
            predictor.classify(given)
    with pytest.raises(DataError, match=r"none\.png can't be read as an image"):
        predictor.classify(tmp_path / "none.png")
    with pytest.raises(CheckpointError, match=r"no-such/model\.json can't be read"):
        ImageClassifier.load(tmp_path / "no-such")
