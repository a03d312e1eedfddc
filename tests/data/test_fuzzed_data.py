"""Data of any bytes: arrays or one short message, soon and in little memory, and nothing half done."""

import gzip
import io
import itertools
import json
import os
import struct
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import BLUE, GREEN, RED, fill, npm_members, plain, png, put, read, small_cifar, write_tar
from damage import damaged, json_values
from datasets import REMEDY, dataset
from fuzzing import MOST_WORDS, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data import dataset as data_module
from pipeline.data.dataset import digest, load_split, save
from pipeline.data.metadata import DESCRIPTION
from pipeline.infra import atomic_io
from pipeline.infra.errors import DataError
from pipeline.sources import cifar
from pipeline.sources.cifar import NPM_ARCHIVE, cifar10
from pipeline.sources.image_folder import read_image

SIZE = 8
FORMATS = ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "jp2", "avif")


def outcome(action, *arguments) -> object:
    """What comes back, or the message."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged images PIL complains as well
            return action(*arguments)
    except DataError as error:
        message = str(error)
    assert len(message) < MOST_WORDS
    return message


def refusal(action, *arguments) -> str:
    message = outcome(action, *arguments)
    assert isinstance(message, str)
    return message


# prepared arrays


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    save(dataset(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path):
    return load_split(folder, "train", torch.device("cpu"))


@fuzz(40)
@given(data=st.data(), kind=st.sampled_from(["images", "labels"]))
def test_damaged_array_is_refused(saved, folder, data, kind):
    name = f"train_{kind}.npy"
    before = (saved / name).read_bytes()
    after = damaged(data, before)
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(after)
    found = outcome(load, folder)
    assert isinstance(found, str) or content_of(before) == content_of(after)


def content_of(file: bytes) -> tuple:
    """What is in an array's file, spaces of its header aside."""
    array = np.load(io.BytesIO(file))
    return array.shape, array.dtype, array.tobytes()


@fuzz(30)
@given(data=st.data())
def test_description_of_any_values_is_refused_or_fits(saved, folder, data):
    content = json.loads((saved / DESCRIPTION).read_text(encoding="utf-8"))
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")
    outcome(load, folder)


def npy(shape: object, *, descr: object = "|u1", fortran: object = False, content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    "content",
    [
        npy((10**12,)),
        npy((1 << 40, 1 << 40)),
        npy((-1, -1152), content=bytes(1152)),
        npy((6, 8, 8, 3), fortran=True, content=bytes(1152)),
        npy((2,), descr="|O", content=bytes(16)),
        npy((10**9,), descr="|V0"),
    ],
    ids=["10^12", "2^80", "negative", "Fortran", "objects", "empty"],
)
def test_header_that_lies_takes_no_memory(folder, content):
    (folder / "train_images.npy").write_bytes(content)
    message = refusal(load, folder)
    assert f"{folder / 'train_images.npy'} " in message
    assert REMEDY in message


def pipe(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def large_zeros(folder: Path) -> None:
    header = npy((400 << 20,))
    (folder / "train_images.npy").write_bytes(header)
    os.truncate(folder / "train_images.npy", len(header) + (400 << 20))


def zipped_arrays(folder: Path) -> None:
    np.savez_compressed(folder / "bomb.npz", a=np.zeros(10**7, np.uint8))
    (folder / "bomb.npz").rename(folder / "train_images.npy")


def other_number(folder: Path) -> None:
    content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    content["splits"]["train"]["images"] = 5
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: os.truncate(f / "train_images.npy", 100 << 30), "its header says 1,152 bytes"),
        (lambda f: os.truncate(f / DESCRIPTION, 100 << 30), "it is over 16 MB"),
        (large_zeros, "train_images.npy is not what dataset.json"),
        (zipped_arrays, "train_images.npy can't be read"),
        (pipe("train_images.npy"), "train_images.npy can't be read (Not a plain file)"),
        (pipe(DESCRIPTION), "dataset.json can't be read (Not a plain file)"),
        (other_number, "with M = 5"),
    ],
    ids=["long", "description", "other digest", "npz", "pipe", "pipe for description", "other number"],
)
def test_prepared_files_that_lie_are_refused_unread(folder, spoil, message):
    spoil(folder)
    assert message in refusal(load, folder)


@pytest.mark.parametrize("written", [0, 1, 6])
def test_stop_between_any_two_files_leaves_the_old_data_or_is_noticed(folder, monkeypatch, written):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = dataset()
    for split in other.splits.values():
        split.images[:] = 255 - split.images
        split.labels[:] = 1 - split.labels
    real, count = atomic_io.write_atomically, iter(range(100))

    def write(path, content):
        if next(count) == written:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(data_module, "write_atomically", write)
    monkeypatch.setattr(atomic_io, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        save(other, folder)
    if written:
        assert "is not what dataset.json" in str(outcome(load, folder))
    else:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# images


def noise(suffix: str) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if suffix in ("png", "jpg", "webp", "tiff") else {}
    kind = {"jpg": "jpeg", "jp2": "jpeg2000"}.get(suffix, suffix)
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


WHOLE = {suffix: noise(suffix) for suffix in FORMATS}


@pytest.mark.parametrize("suffix", FORMATS)
@fuzz(15)
@given(data=st.data())
def test_damaged_image_is_read_or_named(tmp_path, suffix, data):
    path = tmp_path / f"a.{suffix}"
    content = WHOLE[suffix]
    for _ in range(data.draw(st.integers(1, 3))):
        content = damaged(data, content) or b"\0"
    path.write_bytes(content)
    found = outcome(read_image, path, SIZE)
    if isinstance(found, str):
        assert found.startswith(f"{path} can't be read as an image (")
        assert "image ()" not in found
    else:
        assert (found.shape, found.dtype) == ((SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("error", [struct.error("short"), IndexError(), MemoryError()])
def test_whatever_a_decoder_stumbles_over_is_a_message(tmp_path, monkeypatch, error):
    def stumble(image):
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", stumble)
    path = put(plain(), tmp_path / "a.png")
    message = refusal(read_image, path, SIZE)
    assert f"{path} can't be read as an image (" in message
    assert "()" not in message


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    )


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(60_000, 60_000), (1, 100_000_000), (2**31 - 1, 1), (0, 5)]
)
def test_image_of_giant_sides_takes_no_memory(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(width, height))
    message = refusal(read_image, path, SIZE)
    assert str(path) in message
    assert "MemoryError" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(20, 20, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(400 << 20), 1))), "a.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is none of PNG, JPEG"),
    ],
    ids=["text of 400 MB", "PostScript"],
)
def test_image_that_is_a_bomb_or_a_program_is_refused(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    assert message in refusal(read_image, tmp_path / "a.png", SIZE)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000)])
def test_narrowest_images_are_read(tmp_path, size):
    path = put(plain(size=size), tmp_path / "a.png")
    assert outcome(read_image, path, SIZE).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff"])
def test_first_picture_of_an_animation_is_taken(tmp_path, suffix):
    more = [plain(GREEN), plain(BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = put(plain(), tmp_path / f"a.{suffix}", save_all=True, append_images=more, **options)
    assert (read_image(path, SIZE) == RED).all()


def test_brightness_of_16_bits_is_scaled_whatever_the_order_of_bytes(tmp_path):
    values = np.full((12, 12), 65_535, np.uint16)
    values[:, 6:] = 256  # less than 257, which is one step of 8 bits
    path = put(Image.fromarray(values), tmp_path / "a.png")
    found = read_image(path, 12)
    assert (found[:, :6] == 255).all()
    assert (found[:, 6:] == 0).all()


# folders of images


def test_what_tools_leave_behind_is_no_class_and_no_image(tmp_path):
    fill(tmp_path)
    expected = read(tmp_path)
    for place in (".ipynb_checkpoints", "__MACOSX", "cat/.thumbs", "cat/__MACOSX"):
        put(plain(), tmp_path / place / "a.png")
    (tmp_path / "cat" / "._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    found = read(tmp_path)
    assert found.classes == expected.classes
    for name, split in expected.splits.items():
        assert (found.splits[name].images == split.images).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "cat/x.png").symlink_to("nowhere.png"), "cat/x.png can't be read as an image"),
        (lambda f: (f / "cat/x.png").symlink_to("x.png"), "cat/x.png can't be read as an image"),
        (pipe("cat/x.png"), "Not a plain file"),
        (lambda f: (f / "everything").symlink_to("."), "everything links to a folder that it is in"),
    ],
    ids=["no target", "link to itself", "pipe", "link to the folder"],
)
def test_links_and_pipes_in_an_image_folder_are_refused(tmp_path, spoil, message):
    fill(tmp_path)
    spoil(tmp_path)
    assert message in refusal(read, tmp_path)


def test_link_within_a_class_is_not_walked_in_circles(tmp_path):
    (fill(tmp_path) / "cat" / "again").symlink_to("..")
    assert sum(len(split.labels) for split in read(tmp_path).splits.values()) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
@pytest.mark.parametrize("name", [b"c\xff", b"c\n"])
def test_class_whose_name_no_report_can_show_is_refused(tmp_path, name):
    fill(tmp_path)
    (tmp_path / "cat").rename(tmp_path / os.fsdecode(name))
    assert "is no name for a class" in refusal(read, tmp_path)


def test_names_in_any_script_are_kept(tmp_path):
    names = ("Käse", "猫", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627")
    for name, number in itertools.product(names, "12345678"):
        put(plain(), tmp_path / name / f"{name}{number}.png")
    assert read(tmp_path).classes == tuple(sorted(names))


@pytest.mark.parametrize("listed", ["", "cat"])
def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, listed):
    fill(tmp_path)

    def refusing(real):
        def listing(path):
            if Path(path) == tmp_path / listed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return listing

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    message = refusal(read, tmp_path)
    assert f"{tmp_path / listed} can't be listed (Permission denied)" in message
    assert "let this user read it" in message


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_folder_of_an_impossible_name_is_no_folder(name):
    assert "is no folder; set data.folder" in refusal(read, Path(name))


# the archive of CIFAR-10


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    expected = {name: digest(array) for name, array in small_cifar().items()}
    monkeypatch.setattr(cifar, "CIFAR10_DIGESTS", expected)
    monkeypatch.setattr(cifar, "CIFAR_VALIDATION", 4)
    return write_tar(tmp_path / "raw" / NPM_ARCHIVE, npm_members())


def check_refused(archive: Path) -> str:
    message = refusal(cifar10, archive.parent)
    assert f"{archive} is truncated or damaged" in message or f"{archive} holds other" in message
    assert "delete it and repeat" in message
    assert [path.name for path in archive.parent.iterdir()] == [NPM_ARCHIVE]
    return message


@fuzz(20)
@given(data=st.data(), packed=st.booleans())
def test_damaged_archive_is_the_real_data_or_refused(archive, data, packed):
    whole = write_tar(archive, npm_members()).read_bytes()
    content = damaged(data, whole if packed else gzip.decompress(whole))
    archive.write_bytes(content if packed else gzip.compress(content, 1))
    if isinstance(outcome(cifar10, archive.parent), str):
        check_refused(archive)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_lables.json", json.dumps([256 + n for n in range(10)]).encode()),
        ("train_lables.json", b"[" * 100_000),
        ("test_batch.png", png(np.zeros((3, 1024), np.uint8))),
        ("test_batch.png", png(np.zeros((3, 1024, 4), np.uint8))),
        ("test_batch.png", png(np.zeros((3, 1024), np.uint16))),
        ("test_batch.png", png_of(60_000, 60_000)),
    ],
    ids=["label 256", "deep labels", "grey", "with alpha", "16 bits", "bomb"],
)
def test_hostile_member_is_refused(archive, name, content):
    write_tar(archive, npm_members() | {f"package/{name}": content})
    check_refused(archive)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("SYMTYPE", "/etc/passwd"),
        ("LNKTYPE", "package/test_batch.png"),
        ("FIFOTYPE", ""),
        ("DIRTYPE", ""),
    ],
)
def test_member_that_is_no_plain_file_is_refused(archive, kind, target):
    members = npm_members()
    del members["package/test_batch.png"]
    write_tar(archive, members)
    content = gzip.decompress(archive.read_bytes())
    with tarfile.open(fileobj=(buffer := io.BytesIO(content)), mode="a") as made:
        info = tarfile.TarInfo("package/test_batch.png")
        info.type, info.linkname = getattr(tarfile, kind), target
        made.addfile(info)
    archive.write_bytes(gzip.compress(buffer.getvalue(), 1))
    assert "test_batch.png in it is no plain file" in check_refused(archive)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_archive_that_inflates_is_read_up_to_a_size(archive, kind, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_UNPACKED", 16 << 20)
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 30
    with gzip.open(archive, "wb", 1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(100):
            file.write(bytes(1 << 20))
    assert "it has over 16 MB in it" in check_refused(archive)


def sparse(name: str, size: int, kind: str) -> bytes:
    """A member of a tar file without a byte of content that says it has `size` zeros."""
    info = tarfile.TarInfo(name)
    if kind == "pax":
        info.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
            "GNU.sparse.realsize": str(size),
        }  # fmt: skip
        info.size = 512
        return info.tobuf(tarfile.PAX_FORMAT) + b"0\n".ljust(512, b"\0")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(("kind", "name"), [("gnu", "test_lables.json"), ("pax", "test_batch.png")])
def test_sparse_member_takes_no_memory(archive, kind, name):
    content = gzip.decompress(archive.read_bytes()).rstrip(b"\0")
    content += bytes(-len(content) % 512)
    archive.write_bytes(gzip.compress(content + sparse(f"package/{name}", 8 << 30, kind) + bytes(1024)))
    assert f"{name} in it is no plain file" in check_refused(archive)


def test_labels_that_are_large_in_memory_are_refused_unread(archive):
    labels = b"[" + b"[]," * 5_000_000 + b"0]"
    write_tar(archive, npm_members() | {"package/test_lables.json": labels})
    assert "test_lables.json in it has 15,000,003 bytes, over" in check_refused(archive)


def test_archive_of_very_many_members_is_not_read_through(archive):
    header = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
    archive.write_bytes(gzip.compress(header * 400_000, 1))
    assert "MemoryError" not in check_refused(archive)


@pytest.mark.parametrize(
    ("name", "target"), [(NPM_ARCHIVE, "/dev/zero"), ("cifar-10-python.tar.gz", "pipe")]
)
def test_archive_that_is_a_link_to_a_device_or_a_pipe_is_refused(tmp_path, name, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).symlink_to(tmp_path / target)
    assert "Not a plain file" in refusal(cifar10, tmp_path / "raw")


def test_image_of_over_a_gigabyte_is_refused_unread(tmp_path):
    path = tmp_path / "a.webp"
    path.write_bytes(WHOLE["webp"])
    os.truncate(path, 100 << 30)
    assert "it is over 1 GB" in refusal(read_image, path, SIZE)
