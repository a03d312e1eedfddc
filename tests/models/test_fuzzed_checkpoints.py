"""Checkpoints of any bytes: networks or one short message, soon, in little memory, nothing run."""

import argparse
import copy
import io
import json
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import change_tensors, edit, networks, replace_weights
from damage import damaged, json_values
from fuzzing import MAX_MESSAGE, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st
from legacy_files import as_layers

from pipeline.infra import atomic_io
from pipeline.models import checkpoint
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, CheckpointError
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.training import legacy_checkpoints


def refusal(load: Callable, path: Path) -> str:
    """The message, or "" where networks came back."""
    try:
        with bounded():
            load(path)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < MAX_MESSAGE
        return message
    return ""


# our own: a spoiler changes a folder and says whether that must be noticed


def damage_a_file(data: st.DataObject, folder: Path) -> bool:
    path = folder / data.draw(st.sampled_from([WEIGHTS, SIDECAR]))
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    return path.name == WEIGHTS and path.read_bytes() != before  # a class may be named otherwise, say


def damage_weights_and_set_the_digest(data: st.DataObject, folder: Path) -> bool:
    replace_weights(folder, damaged(data, (folder / WEIGHTS).read_bytes()))
    return False


def change_header(data: st.DataObject, folder: Path) -> bool:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    types = st.sampled_from(["F4", "F8_E8M0", "C64", "F16", "BOOL", "I64"])
    value = data.draw(st.one_of(json_values, types) if key == "dtype" else json_values)
    header[name] = header[name] | {key: value} if key else value
    replace_weights(folder, with_header(header, content[8 + length :]))
    return False


def change_sidecar(data: st.DataObject, folder: Path) -> bool:
    content = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    sections = [name for name in content if isinstance(content[name], dict)]
    keys = [*content, *(f"{section}.{key}" for section in sections for key in content[section])]
    edit(folder, data.draw(st.sampled_from(keys)), data.draw(json_values))
    return False


@pytest.fixture
def files(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "spoil", [damage_a_file, damage_weights_and_set_the_digest, change_header, change_sidecar]
)
@fuzz(25)
@given(data=st.data())
def test_damaged_file_of_ours_is_refused_or_fits(folder, files, data, spoil):
    for path, content in files.items():
        path.write_bytes(content)
    must_be_noticed = spoil(data, folder)
    assert refusal(checkpoint.load, folder) or not must_be_noticed


def with_header(header: dict, content: bytes = bytes(4)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def claims(**changes: object) -> dict:
    """One weight of four bytes, in the header of safetensors."""
    return {"resnet.a": {"dtype": "F32", "shape": (1,), "data_offsets": (0, 4)} | changes}


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def giant(folder: Path) -> None:
    checkpoint.save(replace(networks(), policy_net=None), folder)
    edit(folder, "resnet.width", 4096)
    edit(folder, "resnet.depth", 200)


def key_twice(folder: Path) -> None:
    text = (folder / SIDECAR).read_text(encoding="utf-8")
    (folder / SIDECAR).write_text(text.replace('"format": 1', '"format": 1, "format": 1'))


OVERLAP = claims() | {"resnet.b": claims()["resnet.a"]}
HUGE_SHAPE = claims(shape=(1 << 62, 8))
ODD_FLOATS = claims(dtype="F8_E8M0", shape=(4,))
LIES = {
    "header of 2^60 bytes": (
        lambda f: replace_weights(f, struct.pack("<Q", 1 << 60) + b"{}"),
        "no valid",
    ),
    "overlap": (lambda f: replace_weights(f, with_header(OVERLAP)), "no valid safetensors"),
    "overflow": (lambda f: replace_weights(f, with_header(HUGE_SHAPE)), "no valid safetensors"),
    "odd floats": (lambda f: replace_weights(f, with_header(ODD_FLOATS)), "no valid safetensors"),
    "other digest": (lambda f: os.truncate(f / WEIGHTS, 400 << 20), "damaged or of another"),
    "pipe for weights": (lambda f: make_pipe(f / WEIGHTS), "Not a plain file"),
    "pipe for sidecar": (lambda f: make_pipe(f / SIDECAR), "Not a plain file"),
    "100 GB sidecar": (lambda f: os.truncate(f / SIDECAR, 100 << 30), "it is over 16 MB"),
    "key twice": (key_twice, "'format' stands twice"),
    "giant network": (giant, "does not hold the weights"),
    "10^12 blocks": (lambda f: edit(f, "policy_net.num_blocks", 10**12), "policy_net.num_blocks"),
    "stage of 10^6 names": (lambda f: edit(f, "stage", 10**6 * ["x"]), f"{SIDECAR}: stage"),
    "mean of 1e300": (lambda f: edit(f, "normalisation.mean", [1e300, 0, 0]), "normalisation.mean"),
    "variance below 0": (
        lambda f: change_tensors(f, lambda tensors: tensors["resnet.bn1.running_var"].fill_(-1)),
        "bn1.running_var holds variances below 0",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), LIES.values(), ids=LIES)
def test_file_of_ours_that_lies_is_refused(folder, spoil, message):
    spoil(folder)
    assert message in refusal(checkpoint.load, folder)


@pytest.mark.parametrize(
    ("name", "message"), [("new", f"{SIDECAR} can't be read"), ("model", f"{WEIGHTS} is damaged or of")]
)
def test_stop_between_the_two_files_is_recognised(folder, monkeypatch, name, message):
    def stop(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(networks(seed=1), folder.parent / name)
    assert message in refusal(checkpoint.load, folder.parent / name)


def test_stop_within_a_file_leaves_the_old_checkpoint(folder, files, monkeypatch):
    def stop(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic_io.os, "fsync", stop)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(networks(seed=1), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


# the authors'


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return as_layers(cifar_resnet(depth=8, width=2, num_classes=3))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ckpt.t7"


def saved(weights: dict, zipped: bool = True, **more: object) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": weights, **more}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


@pytest.fixture(params=[False, True], ids=["pickle", "zip"])
def content(request, weights) -> bytes:
    return saved(weights, request.param)


@fuzz(25)
@given(data=st.data())
def test_damaged_file_of_the_authors_is_refused_or_fits(path, content, data):
    path.write_bytes(damaged(data, content))
    refusal(legacy_checkpoints.load, path)


class Call:
    """A call of a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def rezipped(
    content: bytes, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The same records, with another pickle."""
    output = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(output, "w", method, compresslevel=1) as new,
    ):
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, change(record) if name.endswith("data.pkl") else record)
    return output.getvalue()


def bomb(content: bytes) -> bytes:
    return rezipped(content, lambda pickled: pickled + bytes(400 << 20), zipfile.ZIP_DEFLATED)


def with_huge_storage(pickled: bytes) -> bytes:
    """Of the first weight, which has 54 numbers."""
    return pickled.replace(b"K\x36", b"J\xff\xff\xff\x7f", 1)


def with_shared_bytes(content: bytes) -> bytes:
    """A zip file with a thousand more records, in the place of the largest."""
    output = io.BytesIO(content)
    with zipfile.ZipFile(output, "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for number in range(1000):
            again = copy.copy(largest)
            again.filename = f"archive/data/{number + 100}"
            archive.filelist.append(again)
        archive._didModify = True
    return output.getvalue()


def with_a_name_twice(content: bytes) -> bytes:
    output = io.BytesIO(content)
    with zipfile.ZipFile(output, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    return output.getvalue()


GIANT = {"fc.weight": torch.zeros(1, 1).expand(2_000_000_000, 8)}
WITHOUT_NUMBERS = {"conv1.weight": torch.zeros(10**9, 0, 3, 3)}
BEYOND_ITS_STORAGE = (torch.zeros(2)._typed_storage(), 0, (3,), (1,), False, OrderedDict())
LIES_OF_OTHERS = {  # file, and what the refusal has
    "giant weight": (lambda w: saved(w | GIANT, zipped=False), "claims more weights than the file has"),
    "giant weight in a zip": (lambda w: saved(w | GIANT), "claims more weights than the file has bytes"),
    "weight of no numbers": (lambda w: saved(w | WITHOUT_NUMBERS, False), "has weights of a network of"),
    "no data": (lambda w: saved(w | {"fc.bias": torch.zeros(3, device="meta")}, False), "plain tensors"),
    "sparse": (lambda w: saved(w | {"fc.bias": torch.zeros(3).to_sparse()}), "plain tensors"),
    "beyond its storage": (
        lambda w: saved(w | {"fc.bias": Call(torch._utils._rebuild_tensor_v2, *BEYOND_ITS_STORAGE)}),
        "it is cut short, damaged or no checkpoint",
    ),
    "huge storage": (lambda w: with_huge_storage(saved(w, zipped=False)), "it claims storages of"),
    "huge storage in a zip": (lambda w: rezipped(saved(w), with_huge_storage), "it claims a storage of"),
    "storage below zero": (
        lambda w: saved(w, zipped=False).replace(b"K\x36", b"J\xff\xff\xff\xff", 1),
        "is refused: it is cut short",
    ),
    "zip bomb": (lambda w: bomb(saved(w)), "its records inflate to more than the file"),
    "shared bytes": (lambda w: with_shared_bytes(saved(w)), "its records inflate to more than the file"),
    "name twice": (lambda w: with_a_name_twice(saved(w)), "two of its records have the same name"),
    "bytearray": (lambda w: saved(w, False, more=Call(bytearray, 10**10)), "bytearray)"),
    "tensor": (lambda w: saved(w, more=Call(torch.FloatTensor, 10**9, 10)), "torch.FloatTensor)"),
    "storage": (lambda w: saved(w, False, more=Call(torch.UntypedStorage, 10**10)), "UntypedStorage)"),
    "long memo": (lambda _: b"\x80\x02r\xff\xff\xff\x7f.", "its pickle has over a million steps"),
    "long text": (lambda _: b"\x80\x02X\xff\xff\xff\x7f.", "expected 2147483647 bytes"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), LIES_OF_OTHERS.values(), ids=LIES_OF_OTHERS)
def test_file_of_the_authors_that_lies_is_refused(path, weights, make, message):
    path.write_bytes(make(weights))
    assert path.stat().st_size < 4 << 20
    assert message in refusal(legacy_checkpoints.load, path)


def test_zip_with_two_directories_is_read_as_it_was_looked_at(path, weights):
    """Python's reader takes the last file, PyTorch's the first, to which the last one's offset leads."""
    others = {name: tensor + 1 for name, tensor in weights.items()}
    path.write_bytes(saved(others) + saved(weights))
    assert torch.equal(torch.load(path)["state_dict"]["conv1.weight"], others["conv1.weight"])
    resnet = legacy_checkpoints.load(path).need_resnet(path)
    assert torch.equal(resnet.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize("zipped", [False, True])
def test_what_trainings_keep_beside_the_weights_is_no_hindrance(path, weights, zipped):
    network = cifar_resnet(depth=8, width=2, num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5])
    more = {
        "epoch": 3, "arch": "resnet8", "best_acc1": torch.tensor(0.5),
        "args": argparse.Namespace(lr=0.1), "raw": b"bytes", "seen": {1, 2},
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
    }  # fmt: skip
    path.write_bytes(saved(weights, zipped, **more))
    resnet = legacy_checkpoints.load(path).need_resnet(path)
    assert torch.equal(resnet.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "huge"])
def test_link_to_no_plain_or_small_file_is_refused(path, tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(b"PK\x03\x04")
    os.truncate(tmp_path / "huge", 100 << 30)
    path.symlink_to(tmp_path / target)
    expected = "it is over 2 GB" if target == "huge" else "Not a plain file"
    assert expected in refusal(legacy_checkpoints.load, path)
