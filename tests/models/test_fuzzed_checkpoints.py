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


@fuzz(60)
@given(data=st.data(), name=st.sampled_from([WEIGHTS, SIDECAR]))
def test_damaged_file_of_ours_is_noticed(saved, folder, data, name):
    before = (saved / name).read_bytes()
    after = damaged(data, before)
    (folder / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    (folder / SIDECAR).write_bytes((saved / SIDECAR).read_bytes())
    (folder / name).write_bytes(after)
    found = refusal_or_none(checkpoint.load, folder)
    assert found or name == SIDECAR or before == after  # a class may be named otherwise, say


@fuzz(60)
@given(data=st.data())
def test_damaged_weights_with_the_digest_set_right_are_networks_or_refused(saved, folder, data):
    replace_weights(folder, damaged(data, (saved / WEIGHTS).read_bytes()))
    refusal_or_none(checkpoint.load, folder)


@fuzz(80)
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
        with_header(json.dumps({"resnet.a": one(shape=(2**64 - 1, 0), offsets=(0, 0))}).encode()),
        with_header(json.dumps({"resnet.a": one("F4", (8,))}).encode(), bytes(4)),
        with_header(json.dumps({"resnet.a": one("F8_E8M0", (4,))}).encode(), bytes(4)),
        with_header(b'{"a":' + b"[" * 100_000),
    ],
    ids=["2^60 bytes", "overlap", "overflow", "2^64 by 0", "half bytes", "odd floats", "deep"],
)
def test_header_that_lies_is_refused(folder, content):
    replace_weights(folder, content)
    assert "is no valid safetensors file" in refusal(checkpoint.load, folder)


@fuzz(80)
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


def test_giant_networks_are_refused_before_they_are_built(tmp_path):
    checkpoint.save(replace(networks(), policy_net=None), tmp_path)
    edit(tmp_path, "resnet.width", 4096)
    edit(tmp_path, "resnet.depth", 200)
    assert "does not hold the weights" in refusal(checkpoint.load, tmp_path)


def test_weights_of_another_digest_take_no_memory(folder):
    os.truncate(folder / WEIGHTS, 400 << 20)
    with bounded(megabytes=100), pytest.raises(CheckpointError, match="damaged or of another"):
        checkpoint.load(folder)


def test_huge_sidecar_is_refused_unread(folder):
    os.truncate(folder / SIDECAR, 100 << 30)
    assert "it is over 16 MB" in refusal(checkpoint.load, folder)


@pytest.mark.parametrize("name", [WEIGHTS, SIDECAR])
def test_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "Not a plain file" in refusal(checkpoint.load, folder)


def test_key_that_stands_twice_in_the_sidecar_is_refused(folder):
    text = (folder / SIDECAR).read_text(encoding="utf-8")
    (folder / SIDECAR).write_text(text.replace('"format": 1', '"format": 1, "format": 1'))
    assert "'format' stands twice" in refusal(checkpoint.load, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalisation.mean", [1e300, 0.0, 0.0]),
        ("normalisation.std", [1e-300, 1.0, 1.0]),
        ("policy_net.input_size", 10**12),
        ("policy_net.num_blocks", 10**12),
        ("classes", ["a", "b", "\ud800"]),
        ("stage", 10**6 * ["x"]),
    ],
)
def test_sidecar_value_out_of_all_bounds_is_named_in_few_words(folder, key, value):
    edit(folder, key, value)
    assert f"{SIDECAR}: {key}" in refusal(checkpoint.load, folder)


def test_variance_below_zero_is_named(folder):
    change_tensors(folder, lambda tensors: tensors["resnet.bn1.running_var"].fill_(-1))
    assert "bn1.running_var holds variances below 0" in refusal(checkpoint.load, folder)


def test_name_of_a_million_letters_is_shortened(folder):
    change_tensors(folder, lambda tensors: tensors.update({"x" * 10**6: torch.zeros(1)}))
    assert "xxx..." in refusal(checkpoint.load, folder)


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
@fuzz(80)
@given(data=st.data())
def test_damaged_file_of_the_authors_is_networks_or_refused(path, weights, zipped, data):
    content = write(path, weights, zipped).read_bytes()
    path.write_bytes(damaged(data, content))
    refusal_or_none(legacy_checkpoints.load, path)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("fc.weight", torch.zeros(1, 1).expand(2_000_000_000, 8)),
        ("conv1.weight", torch.zeros(1, 1, 1, 1).expand(1_000_000, 3, 3, 3)),
    ],
    ids=["classes", "width"],
)
def test_small_file_that_claims_a_giant_weight_is_refused(path, weights, zipped, name, tensor):
    write(path, weights | {name: tensor}, zipped)
    assert "claims more weights than the file has bytes" in refusal(legacy_checkpoints.load, path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("name", "shape"), [("conv1.weight", (10**9, 0, 3, 3)), ("fc.weight", (10**9, 0))]
)
def test_weight_without_numbers_claims_no_giant_network(path, weights, name, shape):
    write(path, weights | {name: torch.zeros(shape)})
    assert "has weights of a network of" in refusal(legacy_checkpoints.load, path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
    ],
    ids=["without data", "sparse"],
)
def test_tensor_of_another_make_is_refused(path, weights, zipped, tensor):
    write(path, weights | {"fc.bias": tensor}, zipped)
    assert "holds more than named, plain tensors" in refusal(legacy_checkpoints.load, path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor_is_refused(path, weights):
    nested = torch.nested.nested_tensor([torch.zeros(3)])
    write(path, weights | {"fc.bias": nested}, zipped=True)
    assert "holds more than named, plain tensors" in refusal(legacy_checkpoints.load, path)


def test_tensor_larger_than_its_storage_is_refused(path, weights):
    numbers = struct.pack("<fff", 7, 8, 9)
    write(path, weights | {"fc.bias": torch.tensor([7.0, 8.0, 9.0])}, zipped=True)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):  # how many numbers the storage has, not how many the tensor
                at = content.index(b"K\x03", content.index(b"fc.bias"))
                content = content[:at] + b"K\x02" + content[at + 2 :]
            archive.writestr(name, numbers[:8] if content == numbers else content)
    assert "storage" in refusal(legacy_checkpoints.load, path)


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
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            with new.open(info.filename, "w") as file:
                file.write(old.read(info))
                for _ in range(400 if info.filename.endswith("data.pkl") else 0):
                    file.write(bytes(1 << 20))
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


def rezipped(content: bytes, more: int, method: int) -> bytes:
    """The same records, with so many MB of zeros behind the pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", method) as new:
        for info in old.infolist():
            with new.open(info.filename, "w") as file:
                file.write(old.read(info))
                for _ in range(more if info.filename.endswith("data.pkl") else 0):
                    file.write(bytes(1 << 20))
    return made.getvalue()


def test_zip_with_two_directories_is_read_as_it_was_looked_at(path, weights):
    content = write(path, weights, zipped=True).read_bytes()
    seen = rezipped(content, 0, zipfile.ZIP_STORED)
    hidden = rezipped(content, 600, zipfile.ZIP_DEFLATED)
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
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (bytearray, (10**10,), "bytearray"),
        (torch.FloatTensor, (10**9, 10), "torch.FloatTensor"),
        (torch.Tensor, (10**9, 10), "torch.Tensor"),
        (torch.UntypedStorage, (10**10,), "torch.storage.UntypedStorage"),
        (
            torch._utils._rebuild_qtensor,
            (None, 0, (10**10,), (1,), (torch.per_tensor_affine, 1.0, 0), False, None),
            "torch._utils._rebuild_qtensor",
        ),
    ],
    ids=["bytes", "floats", "tensor", "storage", "quantised"],
)
def test_object_that_is_as_large_as_a_number_says_is_refused(
    path, weights, zipped, function, arguments, name
):
    content = {"state_dict": weights, "more": Made(function, *arguments)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert f"{name})" in refusal(legacy_checkpoints.load, path)


@pytest.mark.parametrize("zipped", [False, True])
def test_storage_that_claims_more_than_the_file_has_takes_no_memory(path, weights, zipped):
    content = write(path, weights | {"fc.bias": torch.tensor([7.0, 8.0, 9.0])}, zipped).read_bytes()
    at = content.index(b"K\x03", content.index(b"fc.bias"))
    if zipped:
        at_end = rezipped(content, 0, zipfile.ZIP_STORED)
        with zipfile.ZipFile(io.BytesIO(at_end)) as old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                record = old.read(info)
                if info.filename.endswith("data.pkl"):
                    at = record.index(b"K\x03", record.index(b"fc.bias"))
                    record = record[:at] + b"J\xff\xff\xff\x7f" + record[at + 2 :]
                new.writestr(info.filename, record)
    else:
        path.write_bytes(content[:at] + b"J\xff\xff\xff\x7f" + content[at + 2 :])
    assert "it claims" in refusal(legacy_checkpoints.load, path)


@pytest.mark.parametrize(
    "claim",
    [b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02X\xff\xff\xff\x7f.", b"\x80\x04\x8e" + b"\xff" * 8],
)
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


def test_pipe_in_place_of_a_file_of_the_authors_is_not_waited_for(path):
    os.mkfifo(path)
    assert "Not a plain file" in refusal(legacy_checkpoints.load, path)


def test_keys_of_any_size_are_shortened(path):
    torch.save({("a",) * 10**5: 1, "b" * 10**6: 2}, path)
    assert "..." in refusal(legacy_checkpoints.load, path)
