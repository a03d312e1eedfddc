"""Prepared data sets: splits, what is written, and that nothing damaged is read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
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
    return str(caught.value)


def replace(folder: Path, kind: str, array: np.ndarray) -> None:
    """Another array, with a description that agrees."""
    np.save(folder / f"train_{kind}.npy", array)
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    description["splits"]["train"][f"{kind}_sha256"] = digest(array)
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def test_splits_are_disjoint_and_complete():
    splits = split_by_seed(numbered(100), shares={"validation": 0.11, "test": 0.25}, seed=0)
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "validation": 11,
        "test": 25,
        "train": 64,
    }
    assert sorted(np.concatenate([s.labels for s in splits.values()])) == list(range(100))


def test_images_stay_with_their_labels():
    for split in split_by_seed(numbered(50), shares={"test": 0.3}, seed=1).values():
        assert (split.images[:, 0, 0, 0] == split.labels).all()


def test_split_is_drawn_and_not_cut_off():
    test = split_by_seed(numbered(100), shares={"test": 0.25}, seed=0)["test"]
    assert test.labels.max() - test.labels.min() > 50


def test_the_same_seed_gives_the_same_splits_and_another_seed_others():
    first, again, other = (
        split_by_seed(numbered(40), shares={"test": 0.5}, seed=seed)["test"].labels for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_without_shares_everything_is_trained_on():
    splits = split_by_seed(numbered(5), shares={}, seed=0)
    assert list(splits) == ["train"]
    assert len(splits["train"].labels) == 5


@pytest.mark.parametrize(
    ("count", "shares", "empty"),
    [(1, {"test": 0.5}, "train"), (2, {"validation": 0.4, "test": 0.5}, "train"), (0, {}, "train")],
)
def test_empty_split_is_named(count, shares, empty):
    with pytest.raises(DataError) as caught:
        split_by_seed(numbered(count), shares=shares, seed=0)
    assert f"split {empty} of {count} images is empty" in str(caught.value)


def test_empty_training_split_does_not_advise_to_raise_its_share():
    with pytest.raises(DataError) as caught:
        split_by_seed(numbered(1), shares={"test": 0.5}, seed=0)
    assert "raise its share" not in str(caught.value)


def test_saving_twice_gives_identical_bytes_of_every_file(folder, tmp_path):
    save(dataset(), tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert len(names) == 7
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_memory_order_does_not_change_what_is_saved(folder, tmp_path):
    made = dataset()
    turned = {
        name: Arrays(images=np.asfortranarray(split.images), labels=split.labels)
        for name, split in made.splits.items()
    }
    save(Dataset(source=made.source, classes=made.classes, splits=turned), tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", SPLITS)
def test_split_comes_back_as_it_was_saved(folder, name):
    split = load_split(folder, name, CPU)
    assert split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert (split.images.numpy() == dataset().splits[name].images).all()
    assert (split.labels.numpy() == dataset().splits[name].labels).all()


def test_classes_come_back_in_order(folder):
    assert load_classes(folder) == ("cat", "hält")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_one_changed_byte_is_noticed(folder, kind):
    path = folder / f"train_{kind}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = refusal(folder)
    assert f"{path} is not what {DESCRIPTION} beside it says" in message
    assert REMEDY in message


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("kept", [0, 3, 40, 100, 130])
def test_truncated_array_is_named(folder, kind, kept):
    path = folder / f"train_{kind}.npy"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert str(path) in message
    assert REMEDY in message


def test_header_with_an_open_bracket_is_named(folder):
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes().replace(b"'shape': (", b"'shape':(("))
    message = refusal(folder)
    assert str(path) in message
    assert REMEDY in message


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_missing_array_is_named(folder, kind):
    (folder / f"train_{kind}.npy").unlink()
    message = refusal(folder)
    assert str(folder / f"train_{kind}.npy") in message
    assert REMEDY in message


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return Path.mkdir, (self.ran,)


def test_pickled_array_is_refused_and_not_opened(folder, tmp_path):
    array = np.empty(1, dtype=object)
    array[0] = Hostile(tmp_path / "ran")
    np.save(folder / "train_images.npy", array, allow_pickle=True)
    message = refusal(folder)
    assert str(folder / "train_images.npy") in message
    assert REMEDY in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "array", "found"),
    [
        ("images", np.zeros((6, 8, 8), np.uint8), "uint8 (6, 8, 8)"),
        ("images", np.zeros((6, 8, 9, 3), np.uint8), "uint8 (6, 8, 9, 3)"),
        ("images", np.zeros((6, 3, 8, 8), np.uint8), "uint8 (6, 3, 8, 8)"),
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
    assert REMEDY in message


def test_split_without_images_is_refused(folder):
    replace(folder, "images", np.zeros((0, 8, 8, 3), np.uint8))
    replace(folder, "labels", np.zeros(0, np.int64))
    path = folder / DESCRIPTION
    path.write_text(path.read_text(encoding="utf-8").replace('"images": 6', '"images": 0'))
    message = refusal(folder)
    assert REMEDY in message
    assert "M = 0" in message


@pytest.mark.parametrize("label", [-1, 2])
def test_label_outside_the_classes_is_refused(folder, label):
    replace(folder, "labels", np.array([0, 1, 0, 1, 0, label]))
    message = refusal(folder)
    assert f"{folder / 'train'}_labels.npy has labels outside the classes" in message
    assert REMEDY in message


def test_missing_description_is_named(folder):
    (folder / DESCRIPTION).unlink()
    message = refusal(folder)
    assert str(folder / DESCRIPTION) in message
    assert REMEDY in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_description_is_named(folder, content):
    (folder / DESCRIPTION).write_bytes(content)
    message = refusal(folder)
    assert str(folder / DESCRIPTION) in message
    assert REMEDY in message


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '{"classes": ["a"], "splits": {}}', '{"splits": {"train": {}}}']
)
def test_description_of_another_structure_is_named(folder, content):
    (folder / DESCRIPTION).write_text(content, encoding="utf-8")
    message = refusal(folder)
    assert str(folder / DESCRIPTION) in message
    assert REMEDY in message


@pytest.mark.parametrize("content", ["{}", "[]", '{"classes": "ab"}', '{"classes": [1, 2]}'])
def test_description_without_names_of_classes_is_named(folder, content):
    (folder / DESCRIPTION).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_classes(folder)
    assert str(folder / DESCRIPTION) in str(caught.value)
    assert REMEDY in str(caught.value)
