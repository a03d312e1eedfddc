"""params.yaml: what is accepted, and that each refusal names the key, the value and the remedy."""

import copy
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from torch import nn

from pipeline.architectures import IMAGENET as IMAGENET_DEPTHS
from pipeline.architectures import require_trainable
from pipeline.config import ParamsError, load
from pipeline.models.build import make_resnet

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
DIGITS = (ROOT / "presets" / "digits.yaml").read_text(encoding="utf-8")
REMOVED = object()
CIFAR = {
    "data.source": "cifar10",
    "data.image_size": 32,
    "data.validation_fraction": None,
    "data.test_fraction": None,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def write(path: Path, changes: dict[str, object]) -> None:
    content = copy.deepcopy(yaml.safe_load(DIGITS))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def refusal(path: Path, changes: dict[str, object] | None = None, text: str | None = None) -> str:
    if text is None:
        write(path, changes or {})
    else:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_preset_loads(preset):
    source = {"imagefolder_stream": "imagenet"}.get(load(preset).data.source, load(preset).data.source)
    assert source in preset.stem


def test_digits_preset_is_the_params_file_of_the_repository():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets" / "digits.yaml").read_bytes()


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p.stem.startswith("cifar")], ids=lambda preset: preset.stem
)
def test_cifar_presets_have_the_authors_gamma_but_for_our_own(preset):
    assert (load(preset).gamma == 10) == (not preset.stem.endswith(("_quick", "_demo")))


def test_every_preset_has_the_keys_of_digits():
    expected = set(load(ROOT / "presets" / "digits.yaml").flat())
    for preset in PRESETS:
        assert set(load(preset).flat()) == expected, preset.stem


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("gama", "gamma"), ("resnet.dept", "resnet.depth"), ("pretrain.epoch", "pretrain.epochs")],
)
def test_unknown_key_names_its_neighbour(path, key, suggestion):
    assert f"{key}: no such key; did you mean {suggestion}?" in refusal(path, {key: 1})


def test_unknown_key_far_from_all_others_is_to_be_removed(path):
    assert "data.zzzz: no such key; remove it" in refusal(path, {"data.zzzz": 1})


def test_suggestion_comes_from_the_section_of_the_key(path):
    assert "evaluate.epochs: no such key; remove it" in refusal(path, {"evaluate.epochs": 1})


@pytest.mark.parametrize("key", ["gamma", "resnet", "finetune_policy.lr"])
def test_missing_key_says_where_to_copy_it_from(path, key):
    message = refusal(path, {key: REMOVED})
    assert f"{key}: missing; add it" in message
    assert "presets/digits.yaml" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("pretrain.epochs", 1.5, "a valid integer"),
        ("pretrain.epochs", "many", "a valid integer"),
        ("pretrain.epochs", True, "a valid integer"),
        ("seed", False, "a valid integer"),
        ("gamma", True, "a valid number"),
        ("gamma", None, "a valid number"),
        ("augmentation.flip", 1, "a valid boolean"),
        ("data.folder", 3, "a valid string"),
        ("pretrain.optimizer", "rmsprop", "'sgd' or 'adam'"),
        (
            "data.source",
            "mnist",
            "'digits', 'cifar10', 'cifar100', 'imagefolder' or 'imagefolder_stream'",
        ),
    ],
)
def test_wrong_type_names_key_value_and_what_is_allowed(path, key, value, expected):
    message = refusal(path, {key: value})
    assert f"{key}: is {value!r}" in message
    assert expected in message


@pytest.mark.parametrize("value", [None, 3, [1]])
def test_section_that_is_no_section_is_explained_in_words_of_yaml(path, value):
    message = refusal(path, {"resnet": value})
    assert f"resnet: is {value!r}" in message
    assert "ResNetParams" not in message


@pytest.mark.parametrize(("key", "value"), [("pretrain.lr", "0.1"), ("pretrain.epochs", "5")])
def test_quoted_number_is_refused_with_a_hint(path, key, value):
    message = refusal(path, {key: value})
    assert f"{key}: is {value!r}" in message
    assert "without" in message
    assert "quotes" in message


def test_text_that_is_no_number_gets_no_hint_about_quotes(path):
    assert "quotes" not in refusal(path, {"pretrain.epochs": "many"})


@pytest.mark.parametrize("written", ["1e-05", "1e-5", "1E-5", "1.0e-05", ".1e-4", "+1e-05"])
def test_exponent_without_a_point_is_a_number(path, written):
    path.write_text(DIGITS.replace("lr: 0.002", f"lr: {written}"), encoding="utf-8")
    assert load(path).curriculum.lr == 1e-5


def test_whole_number_serves_where_a_fraction_may_stand(path):
    write(path, {"gamma": 3})
    assert load(path).gamma == 3.0


@pytest.mark.parametrize("key", ["gamma", "pretrain.lr", "policy_net.initial_keep_prob"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(path, key, value):
    assert f"{key}: is {value!r}, but it should be" in refusal(path, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("gamma", -1.0, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("pretrain.lr", 0.0, "greater than 0"),
        ("pretrain.epochs", 0, "greater than or equal to 1"),
        ("pretrain.warmup_fraction", 1.0, "less than 1"),
        ("pretrain.label_smoothing", 1.0, "less than 1"),
        ("curriculum.alpha", 0.5, "greater than 0.5"),
        ("finetune_policy.alpha", 1.1, "less than or equal to 1"),
        ("data.image_size", 4, "greater than or equal to 8"),
        ("data.image_size", 1024, "less than or equal to 512"),
        ("policy_net.initial_keep_prob", 1.0, "less than 1"),
        ("policy_net.input_size", 4, "greater than or equal to 8"),
        ("evaluate.bootstrap", 99, "greater than or equal to 100"),
        ("benchmark.rounds", 4, "greater than or equal to 5"),
    ],
)
def test_number_out_of_range_names_its_bound(path, key, value, bound):
    assert f"{key}: is {value!r}, but it should be {bound}" in refusal(path, {key: value})


def test_channel_that_would_be_divided_by_zero_is_refused(path):
    message = refusal(path, {"resnet.std": [0.3, 0.0, 0.3]})
    assert "resnet.std: is 0.0, but it should be greater than or equal to 0.001" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch_sizes", [0], "is 0, but it should be greater than or equal to 1"),
        ("batch_sizes", [], "batch_sizes is empty; name one at least"),
        ("batch_sizes", [8, 8], "batch_sizes [8, 8] names something twice"),
        ("precisions", ["fp16"], "is 'fp16', but it should be 'fp32' or 'bf16'"),
        ("executors", ["fast"], "is 'fast', but it should be 'masked', 'gather'"),
        ("keep_ratios", [0.5, 1.5], "is 1.5, but it should be less than or equal to 1"),
        ("keep_ratios", [0.5], "keep_ratios [0.5] is one point; a line takes two"),
        ("sole_depths", [21], "depth 21 is not 6n+2; the nearest are 20 and 26"),
    ],
)
def test_lists_of_the_benchmark(path, key, value, words):
    message = refusal(path, {f"benchmark.{key}": value})
    assert message.count("\n") == 1  # one problem, one line
    assert "benchmark" in message
    assert words in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sole.depths", [], "sole: depths is empty; name one at least"),
        ("sole.depths", [14, 14], "sole: depths [14, 14] names something twice"),
        ("sole.depths", [21], "sole.depths: depth 21 is not 6n+2; the nearest are 20 and 26"),
        ("sole.depths", 20, "sole.depths: is 20, but it should be a valid tuple"),
        ("sole.depths", [20, 32], "sole.depths [20, 32] names resnet.depth 32, which pretrain trains"),
        ("static.rules", [], "static: rules is empty; name one at least"),
        ("static.rules", ["first", "first"], "static: rules ['first', 'first'] names something twice"),
        ("static.rules", ["last"], "is 'last', but it should be 'first', 'random' or 'distribute'"),
        ("static.num_kept", [], "static: num_kept is empty; name one at least"),
        ("static.num_kept", [5, 5], "static: num_kept [5, 5] names something twice"),
        ("static.num_kept", [0], "is 0, but it should be greater than or equal to 1"),
        ("static.num_kept", [7, 15], "of the 15 blocks of resnet.depth 32; name numbers from 1 to 14"),
    ],
)
def test_lists_of_the_static_rivals(path, key, value, words):
    message = refusal(path, {key: value})
    assert message.count("\n") == 1  # one problem, one line
    assert words in message


@pytest.mark.parametrize("kept", [[1], [14], [1, 7, 14]])
def test_every_number_of_blocks_from_one_to_all_but_one_may_be_kept(path, kept):
    write(path, {"static.num_kept": kept})
    assert load(path).static.num_kept == tuple(kept)


@pytest.mark.parametrize("value", [[0.3, 0.3], [0.3] * 4])
def test_wrong_number_of_channels_shows_the_list(path, value):
    message = refusal(path, {"resnet.mean": value})
    assert "resnet.mean: is " in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("added", "key"), [("gamma: 3.0\n", "gamma"), ("  num_kept: [6]\n", "num_kept")]
)
def test_duplicate_key_names_its_line(path, added, key):
    message = refusal(path, text=DIGITS + added)
    line = len(DIGITS.splitlines()) + 1
    assert f"{path}: {key!r} stands twice (again in line {line}); keep one" in message


def test_the_same_key_in_two_sections_is_no_duplicate(path):
    path.write_text(DIGITS, encoding="utf-8")
    assert load(path).pretrain.epochs != load(path).finetune.epochs


@pytest.mark.parametrize("text", ["a: [1,\n", "a: b: c\n", "\tgamma: 1\n", "a: \x00\n"])
def test_broken_yaml_is_named_as_such(path, text):
    message = refusal(path, text=text)
    assert f"{path} is no valid YAML" in message


def test_broken_yaml_names_line_and_column(path):
    line = 1 + DIGITS[: DIGITS.index("  depth: 32")].count("\n")
    assert f"line {line}, column 1" in refusal(path, text=DIGITS.replace("  depth: 32", "\tdepth: 32"))


def test_yaml_that_would_run_code_is_refused(path, tmp_path):
    ran = tmp_path / "ran"
    message = refusal(path, text=f"gamma: !!python/object/apply:os.mkdir ['{ran}']\n")
    assert f"{path} is no valid YAML" in message
    assert not ran.exists()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- 1\n", "just words\n"])
def test_file_without_keys_says_how_to_get_one_with_keys(path, text):
    message = refusal(path, text=text)
    assert str(path) in message
    assert "make preset NAME=digits" in message


def test_missing_file_says_how_to_get_one(path):
    with pytest.raises(ParamsError, match="make preset NAME=digits") as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_other_encoding_is_named_with_a_remedy(path):
    path.write_bytes(DIGITS.replace("gamma", "gämma").encode("latin-1"))
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert f"{path} is not UTF-8" in str(caught.value)
    assert "save" in str(caught.value)


def test_folder_in_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "? [a]\n: 1\n",
        "? {a: 1}\n: 1\n",
        DIGITS.replace("seed: 0", "seed: 2020-99-01", 1),
        DIGITS.replace("gamma: 2.0", "gamma: 1" + 400 * "0", 1),
        DIGITS.replace("seed: 0", "seed: " + 5000 * "9", 1),
        5000 * "[",
    ],
    ids=["list as key", "mapping as key", "no such day", "over 1e308", "5000 digits", "nested deeply"],
)
def test_odd_yaml_ends_in_a_message_with_the_file_and_no_traceback(path, text):
    assert str(path) in refusal(path, text=text)


def test_byte_order_mark_and_windows_line_ends_change_nothing(path):
    path.write_bytes(("\ufeff" + DIGITS.replace("\n", "\r\n")).encode())
    assert load(path) == load(ROOT / "presets" / "digits.yaml")


@pytest.mark.parametrize("section", ["resnet", "policy_net"])
@pytest.mark.parametrize(
    ("depth", "nearest"), [(7, (8, 14)), (9, (8, 14)), (33, (32, 38)), (37, (32, 38)), (2, (8, 14))]
)
def test_depth_that_is_not_6n_plus_2_names_the_nearest(path, section, depth, nearest):
    message = refusal(path, {f"{section}.depth": depth})
    assert (
        f"{section}: depth {depth} is not 6n+2; the nearest are {nearest[0]} and {nearest[1]}" in message
    )


@pytest.mark.parametrize(("depth", "blocks"), [(8, 3), (32, 15), (110, 54)])
def test_number_of_blocks_follows_from_the_depth(path, depth, blocks):
    write(path, {"resnet.depth": depth, "curriculum.epochs": 100, "static.num_kept": [2]})
    assert load(path).resnet.num_blocks == blocks


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
@pytest.mark.parametrize("share", ["validation_fraction", "test_fraction"])
def test_cifar_with_a_share_says_to_set_it_to_null(path, source, share):
    message = refusal(path, {**CIFAR, "data.source": source, f"data.{share}": 0.1})
    assert "CIFAR's splits are fixed" in message
    assert "set validation_fraction and test_fraction to null" in message


def test_cifar_of_another_size_says_which_it_must_be(path):
    message = refusal(path, {**CIFAR, "data.image_size": 64})
    assert "CIFAR images are 32 pixels wide; set image_size 64 to 32" in message


@pytest.mark.parametrize("share", ["validation_fraction", "test_fraction"])
def test_digits_without_a_share_says_to_set_it(path, share):
    message = refusal(path, {f"data.{share}": None})
    assert "data: digits has no splits of its own; set validation_fraction and test_fraction" in message


def test_shares_that_leave_too_little_to_train_on_are_refused(path):
    message = refusal(path, {"data.validation_fraction": 0.5, "data.test_fraction": 0.4})
    assert "validation_fraction + test_fraction" in message
    assert "lower them" in message


@pytest.mark.parametrize(("source", "folder"), [("digits", "pictures"), ("imagefolder", "import/none")])
def test_folder_that_does_not_go_with_the_source_is_refused(path, source, folder):
    message = refusal(path, {"data.source": source, "data.folder": folder})
    assert repr(folder) in message
    assert f"with source {source}" in message
    assert "import/none" in message


def test_imagefolder_may_have_splits_of_its_own(path):
    shares = {"data.validation_fraction": None, "data.test_fraction": None}
    write(path, {"data.source": "imagefolder", "data.folder": "pictures", **shares})
    assert load(path).data.folder == "pictures"


@pytest.mark.parametrize("key", ["data.folder", "checkpoints.pretrain", "checkpoints.finetune"])
def test_empty_path_is_refused(path, key):
    changes = {key: ""} | ({"data.source": "imagefolder"} if key == "data.folder" else {})
    assert key.split(".")[1] in refusal(path, changes)


def test_policy_input_larger_than_the_image_is_refused(path):
    message = refusal(path, {"policy_net.input_size": 20})
    assert "policy_net.input_size 20 is more than data.image_size 16; lower it" in message


@pytest.mark.parametrize("key", ["data.image_size", "policy_net.input_size"])
def test_side_that_the_shortcuts_cannot_pool_is_refused(path, key):
    assert f"{key}: is 10, but it should be a multiple of 4" in refusal(path, {key: 10})


def test_policy_input_as_large_as_the_image_is_accepted(path):
    write(path, {"policy_net.input_size": 16})
    assert load(path).policy_net.input_size == 16


def test_a_policy_that_would_be_learnt_for_longer_than_the_finetuning_is_refused(path):
    message = refusal(path, {"finetune.epochs": 3, "finetune_policy.train_epochs": 4})
    assert "train_epochs 4 " in message
    assert "epochs 3" in message
    assert "lower them, or null" in message
    write(path, {"finetune.epochs": 3, "finetune_policy.train_epochs": 3})
    assert load(path).finetune_policy.train_epochs == 3
    held = {"finetune.epochs": 3, "finetune_policy.train_epochs": 3, "finetune_policy.frozen_epochs": 1}
    message = refusal(path, held)
    assert "train_epochs 3 are more than finetune.epochs 3 after frozen_epochs 1; lower them" in message
    write(path, held | {"finetune_policy.train_epochs": 2})
    assert load(path).finetune_policy.frozen_epochs == 1


def test_a_finetuning_in_which_the_policy_would_never_learn_is_refused(path):
    message = refusal(path, {"finetune.epochs": 3, "finetune_policy.frozen_epochs": 3})
    assert "frozen_epochs 3 leave none of finetune.epochs 3 for the policy; lower them" in message
    assert "frozen_epochs" in refusal(path, {"finetune_policy.frozen_epochs": -1})


@pytest.mark.parametrize("padding", [16, 20])
def test_padding_as_large_as_the_image_is_refused(path, padding):
    message = refusal(path, {"augmentation.crop_padding": padding})
    assert f"augmentation.crop_padding {padding} " in message
    assert "data.image_size 16" in message
    assert "lower it" in message


@pytest.mark.parametrize(
    ("epochs_per_block", "enough"), [(0.5, 8), (1.0, 15), (2.0, 29), (0.3, 6), (0.01, 2), (0.50005, 9)]
)
def test_curriculum_too_short_says_how_many_epochs_do(path, epochs_per_block, enough):
    short = {"curriculum.epochs_per_block": epochs_per_block, "curriculum.epochs": enough - 1}
    message = refusal(path, short)
    assert f"curriculum.epochs {enough - 1} " in message
    assert f"epochs_per_block {epochs_per_block} it takes {enough} epochs or more" in message
    write(path, short | {"curriculum.epochs": enough})
    assert load(path).curriculum.epochs == enough


def test_imported_policy_may_have_a_short_curriculum(path):
    write(path, {"curriculum.epochs": 1, "checkpoints.curriculum": "import/policy"})
    assert load(path).curriculum.epochs == 1


def test_several_problems_stand_in_one_message(path):
    message = refusal(path, {"gama": 2, "gamma": -1, "resnet.depth": 33, "curriculum.lr": "0.1"})
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert len(lines) == 4
    for key in ("gama", "gamma", "resnet", "curriculum.lr"):
        assert sum(line.startswith(f"  - {key}:") for line in lines) == 1


def test_message_says_that_nothing_was_run(path):
    assert refusal(path, {"gamma": -1}).startswith(f"{path} can't be used, and nothing was run:")


@pytest.mark.parametrize("key", ["gamma", "data.source", "resnet.mean"])
def test_loaded_values_cannot_be_changed(path, key):
    write(path, {})
    place = load(path)
    *sections, last = key.split(".")
    for section in sections:
        place = getattr(place, section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(place, last, getattr(place, last))


def test_flat_has_every_value_of_the_file_under_its_dotted_key(path):
    write(path, {})
    content = yaml.safe_load(DIGITS)
    expected = {
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in content.items()
        for key in (values if isinstance(values, dict) else [None])
    }
    flat = load(path).flat()
    assert set(flat) == expected
    assert flat["gamma"] == content["gamma"]
    assert flat["resnet.mean"] == tuple(content["resnet"]["mean"])
    assert flat["policy_net.input_size"] is None


STREAMED = {
    "data.source": "imagefolder_stream",
    "data.image_size": 64,
    "augmentation.crop_padding": 0,
    "resnet.family": "imagenet",
    "resnet.depth": 50,
    "benchmark.sole_depths": [26],
    "sole.depths": [26],
}


def test_depth_fifty_is_of_both_families(path):
    write(path, STREAMED)
    assert load(path).resnet.num_blocks == 16
    write(path, {"resnet.depth": 50})
    assert load(path).resnet.num_blocks == 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resnet.depth": 32}, "resnet: depth 32 is none of the family imagenet, which has 10, 14, 18"),
        ({"policy_net.family": "imagenet"}, "policy_net: depth 8 is none of the family imagenet"),
        ({"sole.depths": [20]}, "sole.depths: depth 20 is none of the family imagenet"),
        ({"resnet.family": "resnext"}, "resnet.family: is 'resnext', but it should be 'cifar' or"),
    ],
)
def test_network_that_its_family_does_not_have_is_refused(path, changes, words):
    assert words in refusal(path, STREAMED | changes)


def test_padding_of_streamed_images_is_refused_with_the_remedy(path):
    message = refusal(path, STREAMED | {"augmentation.crop_padding": 4})
    assert "augmentation.crop_padding 4 is for images of one size" in message
    assert "set it to 0" in message


def test_folder_of_streamed_images_is_no_parameter(path):
    message = refusal(path, STREAMED | {"data.folder": "photos"})
    assert "folder is for the source imagefolder alone" in message


BASIC = {"policy_net.family": "imagenet", "policy_net.depth": 10}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (BASIC | {"policy_net.width": 4}, "policy_net: width 4 of depth 10 of the family imagenet"),
        (BASIC | {"policy_net.width": 7}, "set it to 8 or more"),
        (BASIC | {"policy_net.width": 1}, "set it to 8 or more"),
        (STREAMED | {"resnet.depth": 34, "resnet.width": 6}, "resnet: width 6 of depth 34"),
        (STREAMED | {"resnet.width": 1}, "set it to 2 or more"),
        (STREAMED | {"resnet.width": 4, "sole.depths": [18]}, "sole.depths: resnet.width 4 of depth 18"),
    ],
)  # fmt: skip
def test_width_whose_gradients_onednn_gets_wrong_is_refused(path, changes, words):
    assert words in refusal(path, changes)


def test_least_widths_are_taken(path):
    write(path, STREAMED | {"resnet.width": 2})
    assert load(path).resnet.width == 2
    write(path, BASIC | {"policy_net.width": 8})
    assert load(path).policy_net.width == 8


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
@pytest.mark.parametrize("width", range(1, 10))
def test_what_is_refused_is_what_has_such_a_convolution(depth, width):
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


@pytest.mark.parametrize(
    ("before", "after"),
    [("seed: 0", "seed: 010"), ("depths: [20]", "depths: [024]"), ("seed: 0", "seed: 1:30"),
     ("gamma: 2.0", "gamma: 1:30.5"), ("flip: false", "flip: off"), ("flip: false", "flip: Yes")],
)  # fmt: skip
def test_value_that_dvc_reads_otherwise_is_refused(path, before, after):
    assert before in DIGITS
    path.write_text(DIGITS.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"in line \d+ is read in two ways, by DVC as another"):
        load(path)


def test_no_epoch_of_finetuning_asks_for_no_other_epochs(path):
    changed = {
        "finetune.epochs": 0,
        "finetune_policy.train_epochs": 3,
        "finetune_policy.frozen_epochs": 0,
    }
    write(path, changed)
    assert load(path).finetune.epochs == 0
