"""Image trees that are listed and not copied: manifests, batches, and what can be wrong with them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import NORMALISATION
from damage import is_pipe
from image_tree import prepare, write_tree
from PIL import Image
from torchvision.transforms import v2

from pipeline.data import streaming
from pipeline.data.dataset import load_split
from pipeline.data.metadata import SPLITS, load_classes
from pipeline.data.streaming import Listing, StreamedSplit
from pipeline.data.transforms import SeededCrop
from pipeline.device import loader_workers
from pipeline.infra.errors import DataError, UserError, explain_memory
from pipeline.models.resnet_imagenet import imagenet_resnet
from pipeline.sources import image_folder
from pipeline.sources.class_folders import scan
from pipeline.training.classification import Classification
from pipeline.training.loop import Position, fit
from pipeline.training.optim import make_optimizer

CPU = torch.device("cpu")
SHARES = {"validation": 0.25}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a prepared tree of images."""
    write_tree(tmp_path / "data/images", train=6, test=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    prepare(tmp_path / "data/images", tmp_path / "data/prepared", image_size=32)
    return tmp_path


def split(project, name="train", workers=0) -> StreamedSplit:
    os.environ["BLOCKDROP_WORKERS"] = str(workers)
    try:
        found = load_split(project / "data/prepared", name, CPU)
    finally:
        del os.environ["BLOCKDROP_WORKERS"]
    assert isinstance(found, StreamedSplit)
    return found


def parts(count: int, size: int = 4) -> list[torch.Tensor]:
    return list(torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(size))


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return SeededCrop(flip=True).draw(count, torch.Generator().manual_seed(seed))


def test_manifests_hold_every_image_once_in_equal_bytes(project):
    found = [split(project, name) for name in SPLITS]
    paths = [path.decode() for one in found for path in one.reader.paths]
    there = [p.relative_to(project / "data/images").as_posix() for p in project.rglob("images/*/*/*")]
    assert sorted(paths) == sorted(there)
    assert [len(one) for one in found] == [14, 4, 9]
    assert load_classes(project / "data/prepared") == ("china", "digit", "flower")
    shutil.copytree(project / "data/images", project / "copy")
    prepare(project / "copy", project / "again", image_size=32)
    for file in (project / "data/prepared").iterdir():
        assert (project / "again" / file.name).read_bytes() == file.read_bytes()


def test_batches_do_not_depend_on_the_processes_that_decode(project):
    alone, others = split(project), split(project, workers=2)
    for epoch in (0, 1):  # the processes stay, and what they read changes
        rows, seeds = parts(len(alone)), draw(len(alone), epoch)
        crop = SeededCrop(flip=True)
        for one, other in zip(
            alone.batches(rows, crop, seeds), others.batches(rows, crop, seeds), strict=True
        ):
            assert torch.equal(one, other)
        for one, other in zip(alone.iter_batches(5), others.iter_batches(5), strict=True):
            assert torch.equal(one, other)


def test_batches_from_the_middle_of_an_epoch_are_the_same(project):
    train = split(project)
    rows, seeds, crop = parts(len(train)), draw(len(train)), SeededCrop(flip=True)
    whole = list(train.batches(rows, crop, seeds))
    rest = list(train.batches(rows[2:], crop, seeds))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_process_without_rows_of_a_batch_is_given_none(project):
    train = split(project, workers=2)
    rows, seeds, crop = parts(len(train)), draw(len(train)), SeededCrop(flip=True)
    whole = list(train.batches(rows, crop, seeds))
    holes = [rows[0], rows[1][:0], *rows[1:], rows[0][:0]]
    found = list(train.batches(holes, crop, seeds))
    assert [len(images) for images in found] == [len(part) for part in holes]
    assert found[1].shape == (0, *whole[0].shape[1:])
    full = [images for images in found if len(images)]
    assert all(torch.equal(a, b) for a, b in zip(full, whole, strict=True))


def test_training_resumed_in_an_epoch_ends_in_the_same_weights(project):
    def learner() -> Classification:
        torch.manual_seed(0)
        resnet = imagenet_resnet(depth=14, width=2, num_classes=3)
        group = {"params": list(resnet.parameters()), "lr": 0.1}
        return Classification(
            resnet, optimizer=make_optimizer("sgd", [group], weight_decay=0.0),
            normalisation=NORMALISATION, precision="fp32",
        )  # fmt: skip

    def go_on(own: Classification, position: Position, steps: int, workers: int) -> None:
        training = fit(
            own, train=split(project, workers=workers), validation=split(project, "validation"),
            epochs=2, batch_size=4, schedule=lambda progress: 1.0, augmentation=SeededCrop(flip=True),
            normalisation=NORMALISATION, key=(0, "pretrain"), position=position,
        )  # fmt: skip
        for _ in range(steps):
            next(training)

    once, twice = learner(), learner()
    go_on(once, Position(), 10, 0)  # 4 steps and an epoch's end, twice
    position = Position()
    go_on(twice, position, 7, 2)
    go_on(twice, position, 3, 0)
    assert position.epoch == 2
    for one, other in zip(once.resnet.parameters(), twice.resnet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_augmentation_is_torchvisions(project):
    train = split(project)
    seeds = draw(len(train))
    before = torch.get_rng_state()
    (found,) = train.batches([torch.tensor([3])], SeededCrop(flip=False), seeds)
    assert torch.equal(torch.get_rng_state(), before)
    path = project / "data/images" / train.reader.paths[3].decode()
    torch.manual_seed(int(seeds[3]))
    expected = v2.RandomResizedCrop(32, antialias=True)(Image.open(path).convert("RGB"))
    assert np.array_equal(found[0].numpy(), np.asarray(expected))


def test_evaluation_takes_the_middle_of_the_scaled_image(project):
    test = split(project, "test")
    path = project / "data/images" / test.reader.paths[0].decode()
    scaled = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    expected = np.asarray(scaled(Image.open(path).convert("RGB")))
    assert np.array_equal(test.image_array()[0], expected)
    assert np.array_equal(next(iter(test.iter_batches(4)))[0].numpy(), expected)


def test_split_in_order_is_decoded_once_where_it_can_be_kept(project, monkeypatch):
    test = split(project, "test")
    first = torch.cat(list(test.iter_batches(4)))
    shutil.rmtree(project / "data/images/test")
    assert torch.equal(torch.cat(list(test.iter_batches(7))), first)
    monkeypatch.setattr(streaming, "CACHE_FRACTION", 0)
    with pytest.raises(DataError):
        list(split(project, "test").iter_batches(4))


def test_some_images_are_spread_over_all(project):
    test = split(project, "test")
    some = test.subset(3)
    assert some.labels.tolist() == [0, 1, 2]
    assert torch.equal(some.images[1], torch.from_numpy(test.image_array()[4]))
    assert len(test.subset(100)) == 9


def half_zeros(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


@pytest.mark.parametrize(
    ("spoil", "workers", "message"),
    [
        (half_zeros, 0, r"can't be read as an image .*repair or remove it"),
        (half_zeros, 2, r"can't be read as an image .*repair or remove it"),
        (Path.unlink, 1, "No such file"),
        (Image.new("RGB", (50, 50)).save, 0,
         r"had [\d,]+ at `prepare`; `dvc repro -f prepare` lists it again"),
    ],
    ids=["broken", "broken for a worker", "taken away", "other size"],
)  # fmt: skip
def test_image_that_was_changed_is_named_in_training(project, spoil, workers, message):
    train = split(project, workers=workers)
    path = project / "data/images" / train.reader.paths[5].decode()
    spoil(path)
    with pytest.raises(DataError, match=message) as caught:
        list(train.batches(parts(len(train)), SeededCrop(flip=True), draw(len(train))))
    assert str(path) in str(caught.value)


def test_process_that_is_killed_is_explained():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. Details are lost")
    assert "lower BLOCKDROP_WORKERS" in explain_memory(error)


@pytest.mark.parametrize("told", ["-1", "many", "65"])
def test_number_of_processes_that_is_none_is_refused(monkeypatch, told):
    monkeypatch.setenv("BLOCKDROP_WORKERS", told)
    with pytest.raises(UserError, match="set a number from 0 to 64"):
        loader_workers(CPU)


def test_on_a_cpu_the_training_decodes_itself(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_WORKERS", raising=False)
    assert loader_workers(CPU) == 0
    assert loader_workers(torch.device("cuda")) >= 1


def test_folder_of_the_images_that_is_not_there_is_named(project):
    (project / "data/images").rename(project / "elsewhere")
    with pytest.raises(DataError, match=r"data/images is no folder.*docs/imagenet.md"):
        split(project)
    (project / "data/images").symlink_to(project / "elsewhere")
    assert len(list(split(project).iter_batches(4))) == 4


def test_one_changed_byte_of_a_manifest_is_noticed(project):
    file = project / "data/prepared/train_manifest.tsv"
    file.write_bytes(file.read_bytes().replace(b"china", b"chinb", 1))
    with pytest.raises(DataError, match=r"train_manifest.tsv.*not what dataset.json.*make repro"):
        split(project)


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        ({"paths": ["../../secret.png"]}, "leaves the folder"),
        ({"paths": ["/secret.png"]}, "leaves the folder"),
        ({"labels": [-1]}, "labels outside the classes"),
        ({"labels": [3]}, "labels outside the classes"),
        ({"paths": ["a\tb.png"]}, "lists 0 images in 1 lines"),
        ({"labels": ["one"]}, "invalid literal"),
        ({"labels": [10**30]}, "too (large|big)"),
    ],
)
def test_manifest_that_lies_is_refused(tmp_path, listing, said):
    content = {"paths": ["a.png"], "labels": [0], "sizes": [9]} | listing
    made = Listing(**{k: v if k == "paths" else np.array(v, dtype=object) for k, v in content.items()})
    streaming.save(dict.fromkeys(SPLITS, made), tmp_path, classes=["a", "b", "c"], image_size=32)
    with pytest.raises(DataError, match=said):
        load_split(tmp_path, "train", CPU)


@pytest.mark.parametrize("change", [{"image_size": None}, {"image_size": 31}, {"splits": {}}])
def test_description_of_lists_that_does_not_fit_is_refused(project, change):
    file = project / "data/prepared/dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=r"dataset\.json"):
        split(project)


def becomes_link(target: str):
    def spoil(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "000.jpg is empty; repair or remove it"),
        (becomes_link("nowhere.jpg"), r"000.jpg can't be read \(No such file or directory\)"),
        (becomes_link("/dev/zero"), r"000.jpg can't be read \(Not a plain file"),
        (is_pipe, r"000.jpg can't be read \(Not a plain file"),
        (lambda path: path.rename(path.with_name("0\t0.jpg")), "rename it in UTF-8"),
    ],
    ids=["empty", "link to nothing", "device", "pipe", "tab in its name"],
)
def test_file_that_no_manifest_can_hold_is_refused(project, spoil, message):
    tree = project / "data/images"
    spoil(tree / "train/china/000.jpg")
    with pytest.raises(DataError, match=message):
        image_folder.imagefolder_stream(scan(tree), shares=SHARES, seed=0)


def test_name_with_a_separator_of_unicode_is_one_line(project):
    tree = project / "data/images"
    (tree / "train/china/000.jpg").rename(tree / "train/china/0\u20280.jpg")
    prepare(tree, project / "data/prepared", image_size=32)
    paths = [path.decode() for name in SPLITS for path in split(project, name).reader.paths]
    assert "train/china/0\u20280.jpg" in paths


def test_another_split_may_be_read_within_a_pass(project):
    train, test = split(project, workers=1), split(project, "test", workers=1)
    rows = parts(len(train))
    seen = [len(list(test.iter_batches(4))) for _ in train.batches(rows)]
    assert seen == [3] * len(rows)
