"""Checkpoints of any bytes: networks or one short message, soon, in little memory, nothing run."""

import argparse
import copy
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import change_tensors, edit, networks, replace_weights
from damage import damaged, json_values
from fuzzing import MOST_WORDS, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st
from legacy_files import as_layers

from pipeline.infra import atomic_io
from pipeline.models import checkpoint
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, CheckpointError
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.training import legacy_checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    checkpoint.save(networks(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal_or_none(load: Callable, path: Path) -> str | None:
    try:
        with bounded():
            load(path)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < MOST_WORDS
        return message
    return None


def refusal(load: Callable, path: Path) -> str:
    message = refusal_or_none(load, path)
    assert message is not None
    return message


# our own


@fuzz(25)
@given(data=st.data(), name=st.sampled_from([WEIGHTS, SIDECAR]))
def test_damaged_file_of_ours_is_noticed(saved, folder, data, name):
    before = (saved / name).read_bytes()
    after = damaged(data, before)
    (folder / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    (folder / SIDECAR).write_bytes((saved / SIDECAR).read_bytes())
    (folder / name).write_bytes(after)
    found = refusal_or_none(checkpoint.load, folder)
    assert found or name == SIDECAR or before == after  # a class may be named otherwise, say


@fuzz(25)
@given(data=st.data())
def test_damaged_weights_with_the_digest_set_right_are_networks_or_refused(saved, folder, data):
    replace_weights(folder, damaged(data, (saved / WEIGHTS).read_bytes()))
    refusal_or_none(checkpoint.load, folder)


@fuzz(25)
@given(data=st.data())
def test_header_of_any_values_is_refused_or_fits(saved, folder, data):
    content = (saved / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    if key is None:
        header[name] = data.draw(json_values)
    else:
        types = st.sampled_from(["F4", "F8_E8M0", "C64", "F16", "BOOL", "I64"])
        header[name][key] = data.draw(st.one_of(json_values, types) if key == "dtype" else json_values)
    replace_weights(folder, with_header(json.dumps(header).encode(), content[8 + length :]))
    refusal_or_none(checkpoint.load, folder)


def with_header(header: bytes, content: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def one(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, int] = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", length=1 << 60),
        with_header(json.dumps({"resnet.a": one(), "resnet.b": one()}).encode(), bytes(4)),
        with_header(json.dumps({"resnet.a": one(shape=(1 << 62, 8))}).encode(), bytes(4)),
        with_header(json.dumps({"resnet.a": one("F8_E8M0", (4,))}).encode(), bytes(4)),
    ],
    ids=["2^60 bytes", "overlap", "overflow", "odd floats"],
)
def test_header_that_lies_is_refused(folder, content):
    replace_weights(folder, content)
    assert "is no valid safetensors file" in refusal(checkpoint.load, folder)


@fuzz(25)
@given(data=st.data())
def test_sidecar_of_any_values_is_refused_or_fits(saved, folder, data):
    content = json.loads((saved / SIDECAR).read_text(encoding="utf-8"))
    place = content
    key = data.draw(st.sampled_from(sorted(content)))
    if isinstance(content[key], dict) and data.draw(st.booleans()):
        place = content[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(json_values)
    (folder / SIDECAR).write_text(json.dumps(content), encoding="utf-8")
    refusal_or_none(checkpoint.load, folder)


def pipe(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def giant(folder: Path) -> None:
    checkpoint.save(replace(networks(), policy_net=None), folder)
    edit(folder, "resnet.width", 4096)
    edit(folder, "resnet.depth", 200)


def negative_variance(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["resnet.bn1.running_var"].fill_(-1))


def key_twice(folder: Path) -> None:
    text = (folder / SIDECAR).read_text(encoding="utf-8")
    (folder / SIDECAR).write_text(text.replace('"format": 1', '"format": 1, "format": 1'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (giant, "does not hold the weights"),
        (lambda f: os.truncate(f / WEIGHTS, 400 << 20), "damaged or of another"),
        (lambda f: os.truncate(f / SIDECAR, 100 << 30), "it is over 16 MB"),
        (pipe(WEIGHTS), "Not a plain file"),
        (pipe(SIDECAR), "Not a plain file"),
        (key_twice, "'format' stands twice"),
        (negative_variance, "bn1.running_var holds variances below 0"),
        (lambda f: edit(f, "normalisation.mean", [1e300, 0.0, 0.0]), f"{SIDECAR}: normalisation.mean"),
        (lambda f: edit(f, "policy_net.num_blocks", 10**12), f"{SIDECAR}: policy_net.num_blocks"),
        (lambda f: edit(f, "stage", 10**6 * ["x"]), f"{SIDECAR}: stage"),
    ],
    ids=["giant network", "other digest", "100 GB sidecar", "pipe for weights", "pipe for sidecar",
         "key twice", "variance below 0", "mean of 1e300", "10^12 blocks", "stage of 10^6 names"],
)  # fmt: skip
def test_file_of_ours_that_lies_is_refused_in_little_memory(folder, spoil, message):
    spoil(folder)
    assert message in refusal(checkpoint.load, folder)


@pytest.mark.parametrize("fresh", [True, False])
def test_stop_between_the_two_files_is_recognised(folder, tmp_path, monkeypatch, fresh):
    place = tmp_path / "new" if fresh else folder

    def stop(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(networks(seed=1), place)
    expected = f"{SIDECAR} can't be read" if fresh else f"{WEIGHTS} is damaged or of another"
    assert expected in refusal(checkpoint.load, place)


def test_stop_within_a_file_leaves_the_old_checkpoint_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic_io.os, "fsync", stop)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(networks(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# the authors'


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return as_layers(cifar_resnet(depth=8, width=2, num_classes=3))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ckpt.t7"


def write(path: Path, weights: dict, zipped: bool = False) -> Path:
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@fuzz(25)
@given(data=st.data())
def test_damaged_file_of_the_authors_is_networks_or_refused(path, weights, zipped, data):
    content = write(path, weights, zipped).read_bytes()
    path.write_bytes(damaged(data, content))
    refusal_or_none(legacy_checkpoints.load, path)


@pytest.mark.parametrize("zipped", [False, True])
def test_small_file_that_claims_a_giant_weight_is_refused(path, weights, zipped):
    write(path, weights | {"fc.weight": torch.zeros(1, 1).expand(2_000_000_000, 8)}, zipped)
    assert "claims more weights than the file has bytes" in refusal(legacy_checkpoints.load, path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weight_without_numbers_claims_no_giant_network(path, weights):
    write(path, weights | {"conv1.weight": torch.zeros(10**9, 0, 3, 3)})
    assert "has weights of a network of" in refusal(legacy_checkpoints.load, path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("tensor", "zipped"), [(torch.zeros(3, device="meta"), False), (torch.zeros(3).to_sparse(), True)]
)
def test_tensor_of_another_make_is_refused(path, weights, tensor, zipped):
    write(path, weights | {"fc.bias": tensor}, zipped)
    assert "holds more than named, plain tensors" in refusal(legacy_checkpoints.load, path)


def rezipped(content: bytes, change=lambda name, record: record, method=zipfile.ZIP_STORED) -> bytes:
    """The same records, each changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return made.getvalue()


def inflated(name: str, record: bytes) -> bytes:
    return record + bytes(400 << 20) if name.endswith("data.pkl") else record


def with_bias_of(pickled: bytes, count: bytes) -> bytes:
    """A pickle that says another number of numbers of the storage of fc.bias, which has three."""
    at = pickled.index(b"K\x03", pickled.index(b"fc.bias"))
    return pickled[:at] + count + pickled[at + 2 :]


@pytest.mark.parametrize(
    ("count", "message"),
    [(b"K\x02", "storage"), (b"J\xff\xff\xff\x7f", "it claims")],
    ids=["less", "more"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_storage_of_another_size_than_its_tensor_says_is_refused(path, weights, zipped, count, message):
    numbers = torch.tensor([7.0, 8.0, 9.0])
    content = write(path, weights | {"fc.bias": numbers}, zipped).read_bytes()

    def change(name: str, record: bytes) -> bytes:
        if name.endswith("data.pkl"):
            return with_bias_of(record, count)
        return record[:8] if count == b"K\x02" and record == struct.pack("<fff", *numbers) else record

    if zipped:
        path.write_bytes(rezipped(content, change))
    elif message == "it claims":
        path.write_bytes(with_bias_of(content, count))
    else:
        pytest.skip("the other format has no storage of its own size")
    assert message in refusal(legacy_checkpoints.load, path)


def test_zip_whose_records_share_their_bytes_is_refused(path, weights):
    write(path, weights, zipped=True)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for number in range(1000):  # each points to the same place
            again = copy.copy(largest)
            again.filename = f"archive/data/{number + 100}"
            archive.filelist.append(again)
        archive._didModify = True
    assert "its records inflate to more than the file" in refusal(legacy_checkpoints.load, path)


def test_zip_bomb_is_refused_before_it_inflates(path, weights):
    content = write(path, weights, zipped=True).read_bytes()
    path.write_bytes(rezipped(content, inflated, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 4 << 20
    assert "its records inflate to more than the file" in refusal(legacy_checkpoints.load, path)


def two_directories(seen: bytes, hidden: bytes) -> bytes:
    """A zip file: readers that look before its end find `seen`, that follow its offset `hidden`."""
    directory = {}
    for name, content in (("seen", seen), ("hidden", hidden)):
        size, offset = struct.unpack("<II", content[-10:-2])
        directory[name] = (content[:offset], bytearray(content[offset : offset + size]))
    (records, entries), (before, other) = directory["seen"], directory["hidden"]
    assert len(entries) == len(other)
    at = 0
    while at < len(entries):  # Python adds how far the directory is from where the end says
        (place,) = struct.unpack("<I", entries[at + 42 : at + 46])
        entries[at + 42 : at + 46] = struct.pack("<I", place + len(before) - len(records))
        at += 46 + sum(struct.unpack("<HHH", entries[at + 28 : at + 34]))
    end = seen[-22:-10] + struct.pack("<II", len(entries), len(before)) + b"\0\0"
    return before + other + records + entries + end


def test_zip_with_two_directories_is_read_as_it_was_looked_at(path, weights):
    content = write(path, weights, zipped=True).read_bytes()
    seen, hidden = rezipped(content), rezipped(content, inflated, zipfile.ZIP_DEFLATED)
    path.write_bytes(two_directories(seen, hidden))
    with bounded(megabytes=200):
        resnet = legacy_checkpoints.load(path).need_resnet(path)
    assert torch.equal(resnet.conv1.weight, weights["conv1.weight"])


def test_zip_with_two_records_of_a_name_is_refused(path, weights):
    write(path, weights, zipped=True)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    assert "two of its records have the same name" in refusal(legacy_checkpoints.load, path)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_trainings_keep_beside_the_weights_is_no_hindrance(path, weights, zipped):
    network = cifar_resnet(depth=8, width=2, num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5])
    content = {
        "epoch": 3, "arch": "resnet8", "best_acc1": torch.tensor(0.5),
        "args": argparse.Namespace(lr=0.1), "raw": b"bytes", "seen": {1, 2},
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "state_dict": weights,
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    resnet = legacy_checkpoints.load(path).need_resnet(path)
    assert torch.equal(resnet.conv1.weight, weights["conv1.weight"])


class Made:
    """Is made anew by a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "arguments", "name", "zipped"),
    [
        (bytearray, (10**10,), "bytearray", False),
        (torch.FloatTensor, (10**9, 10), "torch.FloatTensor", True),
        (torch.UntypedStorage, (10**10,), "torch.storage.UntypedStorage", False),
    ],
)
def test_object_that_is_as_large_as_a_number_says_is_refused(
    path, weights, function, arguments, name, zipped
):
    content = {"state_dict": weights, "more": Made(function, *arguments)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert f"{name})" in refusal(legacy_checkpoints.load, path)


@pytest.mark.parametrize("claim", [b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02X\xff\xff\xff\x7f."])
def test_pickle_that_claims_a_long_text_or_memo_takes_no_memory(path, claim):
    path.write_bytes(claim)
    assert "MemoryError" not in refusal(legacy_checkpoints.load, path)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_link_to_a_device_or_a_pipe_is_refused(path, tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    path.symlink_to(tmp_path / target)
    assert "Not a plain file" in refusal(legacy_checkpoints.load, path)


def test_huge_file_is_refused_unread(path):
    path.write_bytes(b"PK\x03\x04")
    os.truncate(path, 100 << 30)
    assert "it is over 2 GB" in refusal(legacy_checkpoints.load, path)
