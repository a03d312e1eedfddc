"""Prepared data sets: splits, what is written, and that nothing damaged is read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import Hostile
from datasets import REMEDY, dataset, numbered

from pipeline.data.dataset import Arrays, Dataset, digest, load_split, save, split_by_seed
from pipeline.data.metadata import DESCRIPTION, SPLITS, load_classes
from pipeline.infra.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(dataset(), tmp_path / "prepared")
    return tmp_path / "prepared"


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_split(folder, "train", CPU)
    assert REMEDY in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    """Other values in the description, of its own and of the split train's."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    for key, value in changes.items():
        (description if key in description else description["splits"]["train"])[key] = value
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def replace(folder: Path, kind: str, array: np.ndarray) -> None:
    """Another array, with a description that agrees."""
    np.save(folder / f"train_{kind}.npy", array)
    edit(folder, **{f"{kind}_sha256": digest(array)})


def test_splits_are_drawn_disjoint_and_complete():
    splits = split_by_seed(numbered(100), shares={"validation": 0.11, "test": 0.25}, seed=0)
    counts = {name: len(split.labels) for name, split in splits.items()}
    assert counts == {"validation": 11, "test": 25, "train": 64}
    assert sorted(np.concatenate([s.labels for s in splits.values()])) == list(range(100))
    for split in splits.values():
        assert (split.images[:, 0, 0, 0] == split.labels).all()
        assert np.ptp(split.labels) > 50  # drawn and not cut off
    (alone,) = split_by_seed(numbered(5), shares={}, seed=0).items()
    assert (alone[0], len(alone[1].labels)) == ("train", 5)


def test_splits_depend_on_the_seed_alone():
    first, again, other = (
        split_by_seed(numbered(40), shares={"test": 0.5}, seed=seed)["test"].labels for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("count", "shares", "empty"),
    [
        (1, {"test": 0.5}, "train of 1 images is empty; lower the shares or add images"),
        (0, {"test": 0.5}, "test of 0 images is empty; raise its share"),
    ],
)
def test_empty_split_is_named(count, shares, empty):
    with pytest.raises(DataError, match=f"split {empty}"):
        split_by_seed(numbered(count), shares=shares, seed=0)


def test_equal_data_give_identical_bytes_in_any_memory_order(folder, tmp_path):
    made = dataset()
    turned = {
        name: Arrays(images=np.asfortranarray(split.images), labels=split.labels)
        for name, split in made.splits.items()
    }
    save(Dataset(source=made.source, classes=made.classes, splits=turned), tmp_path / "again")
    first, again = (
        {path.name: path.read_bytes() for path in place.iterdir()}
        for place in (folder, tmp_path / "again")
    )
    assert len(first) == 7
    assert first == again


def test_what_was_saved_comes_back(folder):
    assert load_classes(folder) == ("cat", "hält")
    for name in SPLITS:
        split, expected = load_split(folder, name, CPU), dataset().splits[name]
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert (split.images.numpy() == expected.images).all()
        assert (split.labels.numpy() == expected.labels).all()


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_one_changed_byte_is_noticed(folder, kind):
    path = folder / f"train_{kind}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"{path} is not what {DESCRIPTION} beside it says" in refusal(folder)


@pytest.mark.parametrize("name", ["train_images.npy", DESCRIPTION])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} can't be read (No such file" in refusal(folder)


def test_pickled_array_is_refused_and_not_opened(folder, tmp_path):
    array = np.empty(1, dtype=object)
    array[0] = Hostile(tmp_path / "ran")
    np.save(folder / "train_images.npy", array, allow_pickle=True)
    assert str(folder / "train_images.npy") in refusal(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "array", "found"),
    [
        ("images", np.zeros((6, 8, 8), np.uint8), "uint8 (6, 8, 8)"),
        ("images", np.zeros((6, 8, 9, 3), np.uint8), "uint8 (6, 8, 9, 3)"),
        ("images", np.zeros((6, 8, 8, 1), np.uint8), "uint8 (6, 8, 8, 1)"),
        ("images", np.zeros((6, 8, 8, 3), np.float32), "float32 (6, 8, 8, 3)"),
        ("images", np.zeros((5, 8, 8, 3), np.uint8), "uint8 (5, 8, 8, 3)"),
        ("labels", np.zeros((6, 1), np.int64), "(6, 1)"),
        ("labels", np.zeros(6, np.float64), "float64"),
    ],
)
def test_array_of_another_shape_or_type_is_described(folder, kind, array, found):
    replace(folder, kind, array)
    message = refusal(folder)
    assert str(folder / "train") in message
    assert found in message


def test_split_without_images_is_refused(folder):
    replace(folder, "images", np.zeros((0, 8, 8, 3), np.uint8))
    replace(folder, "labels", np.zeros(0, np.int64))
    edit(folder, images=0)
    assert "M = 0" in refusal(folder)


@pytest.mark.parametrize("label", [-1, 2])
def test_label_outside_the_classes_is_refused(folder, label):
    replace(folder, "labels", np.array([0, 1, 0, 1, 0, label]))
    assert f"{folder / 'train'}_labels.npy has labels outside the classes" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"[]"])
def test_broken_description_is_named(folder, content):
    (folder / DESCRIPTION).write_bytes(content)
    assert str(folder / DESCRIPTION) in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("classes", "ab"), ("classes", [1, 2]), ("classes", ["a"]), ("splits", {}), ("images", "6"),
     ("more", 1)],
)  # fmt: skip
def test_description_that_does_not_fit_is_named(folder, key, value):
    edit(folder, **{key: value})
    assert str(folder / DESCRIPTION) in refusal(folder)
