"""Checkpoints: what is saved comes back, and nothing else is let in."""

import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    change_tensors,
    edit,
    folder,  # noqa: F401 - a fixture
    networks,
    replace_weights,
)

from pipeline.models import checkpoint
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, CheckpointError
from pipeline.models.resnet_cifar import cifar_resnet

REMEDY = re.compile(r"\b(copy|rerun|repeat|import|retrain|make it anew)\b")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    return str(caught.value)


def test_networks_come_back_equal_in_every_tensor(folder):
    saved, loaded = networks(), checkpoint.load(folder)
    for own, other in ((saved.resnet, loaded.resnet), (saved.policy_net, loaded.policy_net)):
        assert own.state_dict().keys() == other.state_dict().keys()
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_networks_come_back_with_equal_outputs(folder):
    saved, loaded = networks(), checkpoint.load(folder)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for own, other in ((saved.resnet, loaded.resnet), (saved.policy_net, loaded.policy_net)):
            assert torch.equal(own.eval()(images), other.eval()(images))


def test_everything_beside_the_weights_comes_back(folder):
    saved, loaded = networks(), checkpoint.load(folder)
    for field in ("stage", "normalisation", "image_size", "classes", "metrics"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.policy_net.input_size == 8
    assert (loaded.resnet.depth, loaded.resnet.width, loaded.resnet.num_classes) == (8, 4, 3)


@pytest.mark.parametrize("left_out", ["resnet", "policy_net"])
def test_network_that_was_not_saved_is_none_and_is_missed_by_name(tmp_path, left_out):
    checkpoint.save(replace(networks(), **{left_out: None}), tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert getattr(loaded, left_out) is None
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no .*; import it for") as caught:
        getattr(loaded, f"need_{left_out}")()
    assert {"resnet": "ResNet", "policy_net": "policy network"}[left_out] in str(caught.value)


def test_network_that_was_saved_is_handed_out(folder):
    loaded = checkpoint.load(folder)
    assert loaded.need_resnet() is loaded.resnet
    assert loaded.need_policy_net() is loaded.policy_net


def test_equal_checkpoints_are_equal_bytes(folder, tmp_path):
    checkpoint.save(networks(), tmp_path / "again")
    for name in (WEIGHTS, SIDECAR):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_other_weights_are_other_bytes(folder, tmp_path):
    checkpoint.save(networks(seed=1), tmp_path / "other")
    for name in (WEIGHTS, SIDECAR):
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_saved_folder_holds_two_files_and_no_path_or_time(folder):
    assert sorted(path.name for path in folder.iterdir()) == [SIDECAR, WEIGHTS]
    assert set(json.loads((folder / SIDECAR).read_text(encoding="utf-8"))) == {
        "format",
        "stage",
        "resnet",
        "policy_net",
        "normalisation",
        "image_size",
        "classes",
        "metrics",
        "weights_sha256",
    }


def test_older_sidecar_without_an_image_size_is_read(folder):
    content = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    del content["image_size"]
    (folder / SIDECAR).write_text(json.dumps(content), encoding="utf-8")
    loaded = checkpoint.load(folder)
    assert loaded.image_size is None
    checkpoint.save(loaded, folder)
    assert checkpoint.load(folder).image_size is None


@pytest.mark.parametrize("size", [8, 32, 512])
def test_every_image_size_of_params_comes_back(tmp_path, size):
    checkpoint.save(replace(networks(), image_size=size), tmp_path)
    assert checkpoint.load(tmp_path).image_size == size


@pytest.mark.parametrize("size", [0, 18, 516])
def test_image_size_that_params_refuses_is_not_written(tmp_path, size):
    with pytest.raises(ValueError, match="image_size"):
        checkpoint.save(replace(networks(), image_size=size), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_undefined_metric_that_is_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="loss"):
        checkpoint.save(replace(networks(), metrics={"loss": float("nan")}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    message = refusal(folder)
    assert f"{folder / WEIGHTS} is damaged or of another checkpoint" in message
    assert "SHA-256" in message
    assert REMEDY.search(message)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_one_flipped_bit_is_noticed(folder, at):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert f"{folder / WEIGHTS} is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]", b"\x80\x02}q\0."],
    ids=["empty", "JSON", "header of 2^60 bytes", "list as header", "pickle"],
)
def test_weights_that_are_no_safetensors_are_refused(folder, content):
    replace_weights(folder, content)
    assert f"{folder / WEIGHTS} is no valid safetensors file" in refusal(folder)


def test_huge_file_is_refused_unread(folder):
    os.truncate(folder / WEIGHTS, checkpoint.MAX_BYTES + 1)
    assert f"{folder / WEIGHTS} can't be read (it is over 2 GB)" in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, SIDECAR])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} can't be read" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_sidecar_that_is_no_json_is_named(folder, content):
    (folder / SIDECAR).write_bytes(content)
    assert f"{folder / SIDECAR} is no valid JSON" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}"])
def test_sidecar_of_another_structure_is_named(folder, content):
    (folder / SIDECAR).write_text(content, encoding="utf-8")
    assert str(folder / SIDECAR) in refusal(folder)


WRONG_VALUES = [
    ("surprise", 1),
    ("resnet.surprise", 1),
    ("format", 2),
    ("format", "1"),
    ("stage", 3),
    ("resnet.depth", "8"),
    ("resnet.depth", 8.5),
    ("resnet.depth", -1),
    ("resnet.depth", 10**9),
    ("resnet.width", 0),
    ("resnet.num_classes", True),
    ("policy_net.num_blocks", 0),
    ("policy_net.input_size", "8"),
    ("normalisation.mean", [0.5, 0.5]),
    ("normalisation.std", ["a", "b", "c"]),
    ("normalisation.std", [0.2, 0.0, 0.2]),
    ("normalisation.std", [0.2, float("nan"), 0.2]),
    ("image_size", "16"),
    ("image_size", 16.0),
    ("image_size", 4),
    ("image_size", 18),
    ("image_size", 516),
    ("classes", [1, 2, 3]),
    ("metrics", []),
    ("metrics.accuracy", float("inf")),
    ("weights_sha256", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_sidecar_with_a_wrong_value_names_its_key(folder, key, value):
    edit(folder, key, value)
    assert f"{folder / SIDECAR}: {key}" in refusal(folder)


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("stage", 3), ("resnet.depth", "8")])
def test_sidecar_with_a_wrong_value_shows_it(folder, key, value):
    edit(folder, key, value)
    assert repr(value) in refusal(folder).removeprefix(str(folder))


@pytest.mark.parametrize("section", ["resnet", "policy_net"])
def test_depth_that_no_network_has_is_refused(folder, section):
    edit(folder, f"{section}.depth", 9)
    message = refusal(folder)
    assert str(folder / SIDECAR) in message
    assert "9" in message


@pytest.mark.parametrize(
    ("key", "value", "network"),
    [("resnet.depth", 14, "ResNet"), ("policy_net.depth", 14, "PolicyNet")],
)
def test_deeper_network_than_its_weights_is_refused(folder, key, value, network):
    if network == "ResNet":
        checkpoint.save(replace(networks(), policy_net=None), folder)
    edit(folder, key, value)
    message = refusal(folder)
    assert f"{folder / WEIGHTS} does not hold the weights of its {network}" in message
    assert "blocks.3" in message


def test_shallower_network_than_its_weights_is_refused(tmp_path):
    deep = replace(networks(), resnet=cifar_resnet(depth=14, width=4, num_classes=3), policy_net=None)
    checkpoint.save(deep, tmp_path)
    edit(tmp_path, "resnet.depth", 8)
    assert "unknown blocks.3" in refusal(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("resnet.width", 5), ("policy_net.width", 5)])
def test_network_of_other_shapes_than_its_weights_is_refused(folder, key, value):
    edit(folder, key, value)
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert "expected torch.float32" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("resnet.num_classes", 4), ("policy_net.num_blocks", 9), ("resnet.depth", 14)],
)
def test_sidecar_that_contradicts_itself_is_refused(folder, key, value):
    edit(folder, key, value)
    message = refusal(folder)
    assert str(folder / SIDECAR) in message
    assert str(value if key != "resnet.depth" else 6) in message


def test_names_of_classes_that_are_fewer_than_the_outputs_are_refused(folder):
    edit(folder, "classes", ["cat", "dog"])
    message = refusal(folder)
    assert str(folder / SIDECAR) in message
    assert "classes" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_no_number_is_named(folder, value):
    def spoil(tensors):
        tensors["resnet.blocks.1.conv2.weight"][0, 0, 0, 0] = value

    change_tensors(folder, spoil)
    assert f"{folder / WEIGHTS}: blocks.1.conv2.weight holds NaN or infinite" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_weight_of_another_type_is_named(folder, dtype):
    def spoil(tensors):
        tensors["policy_net.features.fc.bias"] = tensors["policy_net.features.fc.bias"].to(dtype)

    change_tensors(folder, spoil)
    message = refusal(folder)
    assert f"{folder / WEIGHTS}: features.fc.bias is {dtype} (3,)" in message
    assert "expected torch.float32 (3,)" in message


def test_missing_weight_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("resnet.fc.bias"))
    message = refusal(folder)
    assert f"{folder / WEIGHTS} does not hold the weights of its ResNet" in message
    assert "missing fc.bias, unknown none" in message


def test_many_missing_weights_are_counted(folder):
    def spoil(tensors):
        for name in [name for name in tensors if name.startswith("resnet.blocks.0")]:
            del tensors[name]

    change_tensors(folder, spoil)
    assert "and 9 more" in refusal(folder)


@pytest.mark.parametrize("name", ["resnet.surprise", "surprise"])
def test_weight_of_no_network_is_refused(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert "surprise" in message


REFUSED = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no sidecar": lambda folder: (folder / SIDECAR).unlink(),
    "damaged weights": lambda folder: (folder / WEIGHTS).write_bytes(b"x"),
    "no safetensors": lambda folder: replace_weights(folder, b"x"),
    "huge": lambda folder: os.truncate(folder / WEIGHTS, checkpoint.MAX_BYTES + 1),
    "no JSON": lambda folder: (folder / SIDECAR).write_text("{"),
    "format": lambda folder: edit(folder, "format", 2),
    "depth": lambda folder: edit(folder, "resnet.depth", 14),
    "width": lambda folder: edit(folder, "resnet.width", 5),
    "NaN": lambda folder: change_tensors(folder, lambda t: t["resnet.fc.bias"].fill_(float("nan"))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_says_what_to_do(folder, case):
    REFUSED[case](folder)
    words = refusal(folder).replace(str(folder), "")
    assert REMEDY.search(words), words


@pytest.mark.parametrize("left_out", ["resnet", "policy_net"])
def test_missing_network_says_what_to_do(left_out):
    with pytest.raises(CheckpointError) as caught:
        getattr(replace(networks(), **{left_out: None}), f"need_{left_out}")()
    assert REMEDY.search(str(caught.value)), str(caught.value)
