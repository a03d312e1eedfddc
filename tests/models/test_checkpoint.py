"""Checkpoints: what is saved comes back, and nothing else is let in."""

import json
import os
import re
import struct
from dataclasses import replace

import pytest
import torch
from checkpoints import change_tensors, edit, networks, replace_weights

from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, CheckpointError

REMEDY = re.compile(r"\b(copy|rerun|repeat|import|retrain|make it anew)\b")


@pytest.fixture
def refusal(folder):
    """Loads the folder: the message without its path, which every message has, as it has a remedy."""

    def load() -> str:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(folder)
        assert str(folder) in str(caught.value)
        message = str(caught.value).replace(f"{folder}/", "")
        assert REMEDY.search(message), message
        return message

    return load


def test_saved_checkpoint_comes_back(folder):
    saved, loaded = networks(), checkpoint.load(folder)
    assert loaded.need_resnet() is loaded.resnet
    assert loaded.need_policy_net() is loaded.policy_net
    for own, other in ((saved.resnet, loaded.resnet), (saved.policy_net, loaded.policy_net)):
        torch.testing.assert_close(dict(other.state_dict()), dict(own.state_dict()), rtol=0, atol=0)
    for field in ("stage", "normalisation", "image_size", "classes", "metrics"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.policy_net.input_size == 8
    assert (loaded.resnet.depth, loaded.resnet.width, loaded.resnet.num_classes) == (8, 4, 3)


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_pruned_network_comes_back(tmp_path, family):
    depth, channels = {
        "cifar": (8, ((4,), (3,), (16,))), "imagenet": (14, ((4, 2), (8, 8), (16, 1), (32, 30))),
    }[family]  # fmt: skip
    resnet = make_resnet(
        family=family, depth=depth, width=4, num_classes=3, inner_channels=channels
    ).eval()
    checkpoint.save(replace(networks(), resnet=resnet, policy_net=None), tmp_path)
    loaded = checkpoint.load(tmp_path).need_resnet().eval()
    assert loaded.inner_channels == channels
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), resnet(images))
    edit(tmp_path, "resnet.inner_channels", None)
    with pytest.raises(CheckpointError, match=r"blocks\.\d\.(conv|bn)\d\.\w+ is .* expected"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("left_out", "name"), [("resnet", "ResNet"), ("policy_net", "policy network")])
def test_network_that_was_not_saved_is_missed_by_name(tmp_path, left_out, name):
    checkpoint.save(replace(networks(), **{left_out: None}), tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert getattr(loaded, left_out) is None
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no {name}; import it for"):
        getattr(loaded, f"need_{left_out}")()


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_checkpoints_alone_are_equal_bytes(folder, tmp_path, seed):
    checkpoint.save(networks(seed=seed), tmp_path / "again")
    for name in (WEIGHTS, SIDECAR):
        equal = (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert equal == (seed == 0)


def test_saved_folder_holds_two_files_and_no_path_or_time(folder):
    assert sorted(path.name for path in folder.iterdir()) == [SIDECAR, WEIGHTS]
    assert set(json.loads((folder / SIDECAR).read_text(encoding="utf-8"))) == {
        "format", "stage", "resnet", "policy_net", "normalisation", "image_size", "classes", "metrics",
        "weights_sha256",
    }  # fmt: skip


def test_older_sidecar_without_an_image_size_is_read(folder):
    content = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    del content["image_size"]
    (folder / SIDECAR).write_text(json.dumps(content), encoding="utf-8")
    loaded = checkpoint.load(folder)
    assert loaded.image_size is None
    checkpoint.save(loaded, folder)
    assert checkpoint.load(folder).image_size is None


@pytest.mark.parametrize("size", [8, 512])
def test_every_image_size_of_params_comes_back(tmp_path, size):
    checkpoint.save(replace(networks(), image_size=size), tmp_path)
    assert checkpoint.load(tmp_path).image_size == size


@pytest.mark.parametrize(
    ("change", "words"),
    [({"image_size": 18}, "image_size"), ({"metrics": {"loss": float("nan")}}, "loss")],
)
def test_what_no_sidecar_may_hold_is_not_written(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.save(replace(networks(), **change), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["empty", "cut short", "first bit", "last bit"],
)
def test_changed_weights_are_refused_by_their_digest(folder, refusal, change):
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))
    message = refusal()
    assert f"{WEIGHTS} is damaged or of another checkpoint" in message
    assert "SHA-256" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", struct.pack("<Q", 2) + b"[]", b"\x80\x02}q\0."],
    ids=["empty", "JSON", "list as header", "pickle"],
)
def test_weights_that_are_no_safetensors_are_refused(folder, refusal, content):
    replace_weights(folder, content)
    assert f"{WEIGHTS} is no valid safetensors file" in refusal()


def test_huge_file_is_refused_unread(folder, refusal):
    os.truncate(folder / WEIGHTS, checkpoint.MAX_BYTES + 1)
    assert f"{WEIGHTS} can't be read (it is over 2 GB)" in refusal()


@pytest.mark.parametrize("name", [WEIGHTS, SIDECAR])
def test_missing_file_is_named(folder, refusal, name):
    (folder / name).unlink()
    assert f"{name} can't be read" in refusal()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_sidecar_that_is_no_json_is_named(folder, refusal, content):
    (folder / SIDECAR).write_bytes(content)
    assert f"{SIDECAR} is no valid JSON" in refusal()


@pytest.mark.parametrize("content", ["[]", "null", "{}"])
def test_sidecar_of_another_structure_is_named(folder, refusal, content):
    (folder / SIDECAR).write_text(content, encoding="utf-8")
    assert SIDECAR in refusal()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("surprise", 1),
        ("resnet.surprise", 1),
        ("format", 2),
        ("stage", 3),
        ("resnet.depth", "8"),
        ("resnet.depth", -1),
        ("resnet.depth", 9),
        ("resnet.depth", 10**9),
        ("resnet.width", 0),
        ("resnet.num_classes", True),
        ("resnet.inner_channels", "4"),
        ("policy_net.depth", 9),
        ("policy_net.num_blocks", 0),
        ("policy_net.input_size", "8"),
        ("normalisation.mean", [0.5, 0.5]),
        ("normalisation.std", [0.2, 0.0, 0.2]),
        ("normalisation.std", [0.2, float("nan"), 0.2]),
        ("image_size", 16.0),
        ("image_size", 4),
        ("image_size", 18),
        ("image_size", 516),
        ("classes", [1, 2, 3]),
        ("metrics", []),
        ("metrics.accuracy", float("inf")),
        ("weights_sha256", None),
    ],
)
def test_wrong_value_in_a_sidecar_is_shown_with_its_key(folder, refusal, key, value):
    edit(folder, key, value)
    message = refusal()
    assert f"{SIDECAR}: {key}" in message
    assert isinstance(value, list) or f"is {value!r}: " in message  # of a list, a member


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resnet.num_classes", 4, "resnet.num_classes is 4, classes has 3"),
        ("resnet.depth", 14, "policy_net.num_blocks is 3, the ResNet has 6"),
        ("resnet.inner_channels", [[4], [8]], "inner_channels are not 3 times 1 numbers"),
        ("resnet.inner_channels", [[4], [8, 8], [8]], "inner_channels are not 3 times 1 numbers"),
        ("resnet.inner_channels", [[4], [9], [8]], "inner_channels of block 2 are (9,), more than (8,)"),
        ("resnet.inner_channels", [[4], [0], [8]], "resnet.inner_channels.1.0: is 0"),
        ("policy_net.num_blocks", 9, "policy_net.num_blocks is 9, the ResNet has 3"),
        ("classes", ["cat", "dog"], "classes has 2 names"),
    ],
)
def test_sidecar_that_contradicts_itself_is_refused(folder, refusal, key, value, words):
    edit(folder, key, value)
    message = refusal()
    assert message.startswith(SIDECAR)
    assert words in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "policy_net.depth",
            14,
            " does not hold the weights of its PolicyNet: missing features.blocks.3",
        ),
        ("policy_net.width", 5, "expected torch.float32"),
        ("resnet.width", 5, "expected torch.float32"),
    ],
)
def test_architecture_that_the_weights_lack_is_refused(folder, refusal, key, value, words):
    edit(folder, key, value)
    message = refusal()
    assert message.startswith(WEIGHTS)
    assert words in message


def drop(tensors: dict[str, torch.Tensor], start: str) -> None:
    for name in [name for name in tensors if name.startswith(start)]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["resnet.fc.bias"].fill_(float("nan")), ": fc.bias holds NaN or infinite"),
        (lambda t: t["resnet.fc.bias"][0].fill_(float("-inf")), ": fc.bias holds NaN or infinite"),
        (
            lambda t: t.update({"resnet.fc.bias": t["resnet.fc.bias"].half()}),
            ": fc.bias is torch.float16 (3,), expected torch.float32 (3,)",
        ),
        (lambda t: drop(t, "resnet.fc.bias"), "of its ResNet: missing fc.bias, unknown none"),
        (lambda t: drop(t, "resnet.blocks.0"), "and 9 more, unknown none"),
        (lambda t: t.update({"resnet.surprise": torch.zeros(1)}), "missing none, unknown surprise"),
        (
            lambda t: t.update({"surprise": torch.zeros(1)}),
            "weights of no network of model.json: surprise",
        ),
    ],
    ids=["NaN", "infinity", "another type", "missing", "many missing", "unknown", "of no network"],
)
def test_weight_that_does_not_belong_is_named(folder, refusal, change, words):
    change_tensors(folder, change)
    message = refusal()
    assert message.startswith(WEIGHTS)
    assert words in message
