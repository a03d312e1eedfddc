"""params.yaml: what is accepted, and that each refusal names the key, the value and the remedy."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from torch import nn

from pipeline.architectures import IMAGENET as IMAGENET_DEPTHS
from pipeline.architectures import require_trainable
from pipeline.config import RENAMED, RENAMED_EXECUTORS, Params, ParamsError, load
from pipeline.models.build import make_resnet

ROOT = Path(__file__).parents[1]
DIGITS = (ROOT / "presets/digits.yaml").read_text(encoding="utf-8")
REMOVED = object()
CIFAR = {
    "data.source": "cifar10",
    "data.image_size": 32,
    "data.validation_fraction": None,
    "data.test_fraction": None,
}
PATHS = {"policy_net.paths": [0, 9], "policy_pretrain.epochs": 1}
STREAMED = {
    "data.source": "imagefolder_stream",
    "data.image_size": 64,
    "augmentation.crop_padding": 0,
    "resnet.family": "imagenet",
    "resnet.depth": 50,
    "benchmark.sole_depths": [26],
    "sole.depths": [26],
}
BASIC = {"policy_net.family": "imagenet", "policy_net.depth": 10}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def write(path: Path, changes: Mapping[str, object]) -> None:
    """The defaults with other values under dotted keys."""
    content = yaml.safe_load(DIGITS)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = content[sections[0]] if sections else content
        section[last] = value
        if value is REMOVED:
            del section[last]
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def accepted(path: Path, changes: Mapping[str, object]) -> Params:
    write(path, changes)
    return load(path)


def refusal(path: Path, changes: Mapping[str, object] | str) -> str:
    """The message on changed defaults, or on a text."""
    if isinstance(changes, str):
        path.write_text(changes, encoding="utf-8")
    else:
        write(path, changes)
    with pytest.raises(ParamsError) as caught:
        load(path)
    return str(caught.value)


# YAML


@pytest.mark.parametrize("text", ["1e-05", "1E-5", ".1e-4", "+1e-05"])
def test_exponent_without_a_point_is_a_number(path, text):
    path.write_text(DIGITS.replace("lr: 0.002", f"lr: {text}"), encoding="utf-8")
    assert load(path).curriculum.lr == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [("seed: 0", "seed: 010", "seed"), ("depths: [20]", "depths: [024]", "sole_depths"),
     ("gamma: 2.0", "gamma: 1:30.5", "gamma"), ("flip: false", "flip: off", "flip")],
)  # fmt: skip
def test_value_that_dvc_reads_otherwise_is_refused(path, old, new, key):
    message = refusal(path, DIGITS.replace(old, new, 1))
    assert f"{key}: is {new.split(': ')[1].strip('[]')!r}, but it should be a valid" in message


@pytest.mark.parametrize(
    ("added", "key"), [("gamma: 3.0\n", "gamma"), ("  num_kept: [6]\n", "num_kept")]
)
def test_duplicate_key_names_its_line(path, added, key):
    message = refusal(path, DIGITS + added)
    assert f"{key} stands twice" in message
    assert f"line {len(DIGITS.splitlines()) + 1}" in message


def test_merged_keys_are_read(path):
    text = DIGITS.replace("  batch_size: 64\n  lr: 0.002", "  <<: {batch_size: 32}\n  lr: 0.002", 1)
    path.write_text(text, encoding="utf-8")
    assert load(path).curriculum.batch_size == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,\n", "line 2, column 1"),
        ("\tgamma: 1\n", "line 1, column 1"),
        ("a: \x00\n", "special characters"),
        ("1: 2\n", "this is no name of a parameter"),
        ("? [a]\n: 1\n", "this is no name of a parameter"),
        ("a: 1\n---\na: 1\n", "expected a single document"),
        ("gamma: !!python/object/apply:os.mkdir [ran]\n", "could not determine a constructor"),
    ],
)
def test_broken_yaml_names_the_line(path, monkeypatch, text, words):
    monkeypatch.chdir(path.parent)
    message = refusal(path, text)
    assert f"{path} is no valid YAML" in message
    assert words in message
    assert "correct it there" in message
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["", "- 1\n", "seed: !!int x\n", "seed: " + 5000 * "9", 5000 * "["])
def test_unreadable_file_says_how_to_get_another(path, text):
    message = refusal(path, text)
    assert str(path) in message
    assert "make preset NAME=digits" in message


def test_file_that_can_not_be_read_is_named_with_a_remedy(path):
    with pytest.raises(ParamsError, match="is missing; `make preset"):
        load(path)
    with pytest.raises(ParamsError, match="can't be read"):
        load(path.parent)
    path.write_bytes(DIGITS.replace("gamma", "gämma").encode("latin-1"))
    with pytest.raises(ParamsError, match=r"is not UTF-8 text .*save it as UTF-8"):
        load(path)


def test_byte_order_mark_and_windows_line_ends_change_nothing(path):
    path.write_bytes(("\ufeff" + DIGITS.replace("\n", "\r\n")).encode())
    assert load(path) == load(ROOT / "presets/digits.yaml")


# Keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gama": 1}, "gama: no such key; did you mean gamma?"),
        ({"resnet.dept": 1}, "resnet.dept: no such key; did you mean resnet.depth?"),
        ({"evaluate.epochs": 1}, "evaluate.epochs: no such key; remove it"),  # other sections have it
        ({"gamma": REMOVED}, "gamma: missing; add it (presets/digits.yaml"),
        ({"resnet": REMOVED}, "resnet: missing; add it (presets/digits.yaml"),
        ({"finetune_policy.lr": REMOVED}, "finetune_policy.lr: missing; add it (presets/digits.yaml"),
        ({"resnet": None}, "resnet: is None, but it is a section: give it"),
        *(
            ({"benchmark.executors": ["gather", old]}, f"executors: {old} is renamed; use {new}")
            for old, new in RENAMED_EXECUTORS.items()
        ),
    ],
)
def test_key_that_is_not_expected_names_its_neighbour(path, changes, words):
    assert words in refusal(path, changes)


def test_file_of_an_older_version_is_told_the_new_names_alone(path):
    """Not that the new ones are missing too, or whole sections of them."""
    assert set(RENAMED.values()) <= set(load(ROOT / "params.yaml").flat())
    sections = {"finetune_policy": REMOVED, "checkpoints": REMOVED}
    new_names = {new: REMOVED for new in RENAMED.values() if new.split(".")[0] not in sections}
    lines = refusal(path, dict.fromkeys(RENAMED, 1) | new_names | sections).splitlines()
    assert sorted(lines[1:]) == sorted(f"  - {old}: renamed; use {new}" for old, new in RENAMED.items())


def test_several_problems_stand_in_one_message(path):
    message = refusal(path, {"gama": 2, "gamma": -1, "resnet.depth": 33, "curriculum.lr": "0.1"})
    heading, *lines = message.splitlines()
    assert heading == f"{path} can't be used, and nothing was run:"
    keys = ("gama", "gamma", "resnet", "curriculum.lr")
    assert {line.split(":")[0] for line in lines} == {f"  - {key}" for key in keys}


# Types and ranges


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pretrain.epochs", 1.5, "a valid integer"),
        ("pretrain.epochs", True, "a valid integer"),
        ("gamma", True, "a valid number"),
        ("gamma", None, "a valid number"),
        ("gamma", float("nan"), "a finite number"),
        ("augmentation.flip", 1, "a valid boolean"),
        ("data.folder", 3, "a valid string"),
        ("pretrain.optimizer", "rmsprop", "'sgd' or 'adam'"),
        ("data.source", "mnist", "'digits', 'cifar10', 'cifar100', 'imagefolder' or"),
        ("gamma", -1.0, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("pretrain.lr", 0.0, "greater than 0"),
        ("pretrain.epochs", 0, "greater than or equal to 1"),
        ("pretrain.warmup_fraction", 1.0, "less than 1"),
        ("curriculum.alpha", 0.5, "greater than 0.5"),
        ("finetune_policy.alpha", 1.1, "less than or equal to 1"),
        ("finetune_policy.frozen_epochs", -1, "greater than or equal to 0"),
        ("data.image_size", 1024, "less than or equal to 512"),
        ("data.image_size", 10, "a multiple of 4"),
        ("policy_net.input_size", 4, "greater than or equal to 8"),
        ("policy_net.initial_keep_prob", 1.0, "less than 1"),
        ("evaluate.bootstrap", 99, "greater than or equal to 100"),
        ("benchmark.rounds", 4, "greater than or equal to 5"),
        ("sole.depths", 20, "a valid tuple"),
    ],
)
def test_wrong_value_names_what_is_allowed(path, key, value, words):
    message = refusal(path, {key: value})
    assert f"{key}: is {value!r}, but it should be {words}" in message
    assert "quotes" not in message


def test_quoted_number_is_refused_with_a_hint(path):
    message = refusal(path, {"pretrain.lr": "0.1"})
    assert "pretrain.lr: is '0.1'" in message
    assert "write a number without quotes" in message


def test_whole_number_serves_where_a_fraction_may_stand(path):
    assert accepted(path, {"gamma": 3}).gamma == 3.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resnet.mean", [0.3, 0.3], "resnet.mean: is [0.3, 0.3], but it takes 3 numbers"),
        ("resnet.mean", [0.3] * 4, "resnet.mean: is [0.3, 0.3, 0.3, 0.3], but"),
        ("resnet.std", [0.3, 0.0, 0.3], "std: is 0.0, but it should be greater than or equal to 0.001"),
        ("benchmark.batch_sizes", [0], "is 0, but it should be greater than or equal to 1"),
        ("benchmark.batch_sizes", [], "batch_sizes: is empty; name one at least"),
        ("benchmark.batch_sizes", [8, 8], "batch_sizes: [8, 8] names something twice"),
        ("benchmark.precisions", ["fp16"], "is 'fp16', but it should be 'fp32' or 'bf16'"),
        ("benchmark.executors", ["fast"], "is 'fast', but it should be 'masked', 'gather'"),
        ("benchmark.keep_ratios", [0.5, 1.5], "is 1.5, but it should be less than or equal to 1"),
        ("benchmark.keep_ratios", [0.5], "keep_ratios [0.5] is one point; a line takes two"),
        ("benchmark.sole_depths", [21], "depth 21 is not 6n+2; the nearest are 20 and 26"),
        ("sole.depths", [], "sole.depths: is empty; name one at least"),
        ("sole.depths", [14, 14], "sole.depths: [14, 14] names something twice"),
        ("sole.depths", [21], "sole.depths: depth 21 is not 6n+2; the nearest are 20 and 26"),
        ("sole.depths", [20, 32], "sole.depths [20, 32] names resnet.depth 32, which pretrain trains"),
        ("static.rules", [], "static.rules: is empty; name one at least"),
        ("static.rules", ["last"], "is 'last', but it should be 'first', 'random' or 'distribute'"),
        ("static.num_kept", [5, 5], "static.num_kept: [5, 5] names something twice"),
        ("static.num_kept", [7, 15], "of the 15 blocks of resnet.depth 32; name numbers from 1 to 14"),
    ],
)
def test_wrong_list_is_one_problem(path, key, value, words):
    message = refusal(path, {key: value})
    assert message.count("\n") == 1
    assert words in message


def test_loaded_values_cannot_be_changed(path):
    params = accepted(path, {})
    for section, key in ((params, "gamma"), (params.data, "source")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_flat_has_every_value_under_its_dotted_key(path):
    content = yaml.safe_load(DIGITS)
    flat = accepted(path, {}).flat()
    assert set(flat) == {
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in content.items()
        for key in (values if isinstance(values, dict) else [None])
    }
    assert flat["gamma"] == content["gamma"]
    assert flat["resnet.mean"] == tuple(content["resnet"]["mean"])
    assert flat["policy_net.input_size"] is None


# Values that must fit together


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune.ratio": 0.1, "resnet.width": 8},
         "prune.ratio 0.1 takes none of the 8, 16, 32 channels inside the blocks"),
        (CIFAR | {"data.test_fraction": 0.1}, "CIFAR's splits are fixed"),
        (CIFAR | {"data.source": "cifar100", "data.validation_fraction": 0.1}, "test_fraction to null"),
        (CIFAR | {"data.image_size": 64}, "CIFAR images are 32 pixels wide; set image_size 64 to 32"),
        ({"data.test_fraction": None}, "digits has no splits of its own; set validation_fraction and"),
        ({"data.validation_fraction": 0.5, "data.test_fraction": 0.4}, "+ test_fraction leave under"),
        ({"data.folder": "photos"}, "it is 'photos' with source digits"),
        ({"data.source": "imagefolder"}, "it is 'import/none' with source imagefolder"),
        ({"data.source": "imagefolder", "data.folder": ""}, "data.folder: is ''"),
        ({"checkpoints.pretrain": ""}, "checkpoints.pretrain: is ''"),
        ({"policy_net.input_size": 20}, "input_size 20 is more than data.image_size 16; lower it"),
        ({"augmentation.crop_padding": 16}, "crop_padding 16 is as large as the image"),
        ({"resnet.depth": 37}, "resnet: depth 37 is not 6n+2; the nearest are 32 and 38"),
        ({"policy_net.depth": 2}, "policy_net: depth 2 is not 6n+2; the nearest are 8 and 14"),
        ({"finetune.epochs": 3, "finetune_policy.train_epochs": 4}, "4 are more than finetune.epochs 3"),
        ({"finetune.epochs": 3, "finetune_policy.frozen_epochs": 1, "finetune_policy.train_epochs": 3},
         "train_epochs 3 are more than finetune.epochs 3 after frozen_epochs 1; lower them, or null"),
        ({"finetune.epochs": 3, "finetune_policy.frozen_epochs": 3}, "leave none of finetune.epochs 3"),
        ({"policy_net.paths": [0, 9]}, "need a policy network that classifies; set"),
        ({"policy_net.paths": [9]}, "paths [9] leave no choice; name two at least, or none: []"),
        (PATHS | {"policy_net.paths": [0, 0]}, "paths: [0, 0] names something twice"),
        (PATHS | {"policy_net.paths": [0, 16]}, "keep more than the 15 blocks of resnet.depth 32"),
        (PATHS | {"policy_net.input_size": 8}, "input_size 8 is for policies without paths; set it to"),
        ({"policy_pretrain.epochs": 1}, "train a classifier that nothing uses; set policy_net.paths"),
        (STREAMED | {"augmentation.crop_padding": 4}, "crops are of random area, set it to 0"),
        (STREAMED | {"data.folder": "photos"}, "folder is for the source imagefolder alone"),
        (STREAMED | {"resnet.depth": 32}, "resnet: depth 32 is none of the family imagenet, which"),
        (STREAMED | {"policy_net.family": "imagenet"}, "policy_net: depth 8 is none of the family"),
        (STREAMED | {"sole.depths": [20]}, "sole.depths: depth 20 is none of the family imagenet"),
        (BASIC | {"policy_net.width": 4}, "policy_net: width 4 of depth 10 of the family imagenet"),
        (BASIC | {"policy_net.width": 7}, "set it to 8 or more"),
        (STREAMED | {"resnet.width": 1}, "set it to 2 or more"),
        (STREAMED | {"resnet.width": 4, "sole.depths": [18]}, "sole.depths: resnet.width 4 of depth 18"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(path, changes, words):
    assert words in refusal(path, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_net.input_size": 16},
        {"static.num_kept": [1, 7, 14]},
        PATHS | {"policy_net.paths": [0, 15]},
        {"policy_net.paths": [0, 9], "checkpoints.policy_pretrain": "import/classifier"},
        PATHS | {"curriculum.epochs": 1},  # nothing is learnt there
        {"data.source": "imagefolder", "data.folder": "pictures", "data.validation_fraction": None,
         "data.test_fraction": None},
        {"curriculum.epochs": 1, "checkpoints.curriculum": "import/policy"},
        {"finetune.epochs": 3, "finetune_policy.train_epochs": 2, "finetune_policy.frozen_epochs": 1},
        {"finetune.epochs": 0, "finetune_policy.train_epochs": 3},
        STREAMED | {"resnet.width": 2},
        BASIC | {"policy_net.width": 8},
    ],
)  # fmt: skip
def test_values_at_a_bound_are_accepted(path, changes):
    flat = accepted(path, changes).flat()
    for key, value in changes.items():
        assert flat[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("epochs_per_block", "enough"), [(0.5, 8), (1.0, 15), (0.01, 2), (0.50005, 9)])
def test_short_curriculum_says_how_many_epochs_it_takes(path, epochs_per_block, enough):
    short = {"curriculum.epochs_per_block": epochs_per_block, "curriculum.epochs": enough - 1}
    message = refusal(path, short)
    assert f"curriculum.epochs {enough - 1} " in message
    assert f"epochs_per_block {epochs_per_block} it takes {enough} epochs or more" in message
    assert accepted(path, short | {"curriculum.epochs": enough}).curriculum.epochs == enough


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"resnet.depth": 8, "static.num_kept": [2]}, 3),
        ({"resnet.depth": 50}, 24),
        (STREAMED, 16),  # a depth of both families
    ],
)
def test_number_of_blocks_follows_from_the_depth(path, changes, blocks):
    assert accepted(path, changes).resnet.num_blocks == blocks


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
@pytest.mark.parametrize("width", [1, 2, 7, 8])  # below, at and above the bounds of both kinds of blocks
def test_width_whose_gradients_onednn_gets_wrong_is_refused(depth, width):
    resnet = make_resnet(family="imagenet", depth=depth, width=width, num_classes=2)
    strided = [
        part.in_channels
        for part in resnet.modules()
        if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride == (2, 2)
    ]
    if any(2 <= channels <= 7 for channels in strided):
        with pytest.raises(ValueError, match="can't be trained on every CPU"):
            require_trainable("imagenet", depth, width)
    else:
        require_trainable("imagenet", depth, width)
