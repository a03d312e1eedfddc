"""params.yaml of any content: parameters or one short message, soon and in little memory."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from fuzzing import MOST_WORDS, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import MAX_BYTES, Params, ParamsError, load

DIGITS = (Path(__file__).parents[2] / "presets" / "digits.yaml").read_text(encoding="utf-8")
VALUES: dict = yaml.safe_load(DIGITS)
KEYS = [
    (section, key) for section, values in VALUES.items() if isinstance(values, dict) for key in values
] + [(key,) for key in VALUES]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 8, 10**9, 10**18, 10**40, -(10**400), 1e300, -0.0, 5e-324, 1e9]),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=8),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
written = st.sampled_from(
    ["!!bool x", "!!int x", "!!timestamp x", "!!set {a}", "!!map x", "!!python/name:os.system", "=", "~",
     "&a [*a]", "*b", "1:30:00", "0x1F", ".inf", "1_0", "'1'", "{", "]", "- 1", "!!binary a", "|"]
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def outcome(path: Path, content: str | bytes) -> Params | str:
    """What is loaded, or the message."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        with bounded():
            return load(path)
    except ParamsError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < MOST_WORDS + len(str(path))
        return message


def refusal(path: Path, content: str | bytes) -> str:
    message = outcome(path, content)
    assert isinstance(message, str)
    return message


@fuzz(250)
@given(data=st.data())
def test_values_of_every_kind_in_every_place_are_taken_or_named(path, data):
    content = copy.deepcopy(VALUES)
    for place in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        section = content.get(place[0]) if len(place) == 2 else content
        if not isinstance(section, dict) or place[-1] not in section:
            continue
        change = data.draw(st.sampled_from(["replace", "drop", "rename"]))
        if change == "replace":
            section[place[-1]] = data.draw(anything)
        elif change == "drop":
            del section[place[-1]]
        else:
            section[data.draw(st.text(min_size=1, max_size=8))] = section.pop(place[-1])
    found = outcome(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    assert isinstance(found, str) or set(found.flat()) == set(load_flat())


def load_flat() -> list[str]:
    return [
        ".".join(place) for place in KEYS if len(place) == 2 or not isinstance(VALUES[place[0]], dict)
    ]


@fuzz(250)
@given(st.integers(0, len(DIGITS)), st.integers(0, 30), st.one_of(written, st.text(max_size=12)))
def test_text_with_a_piece_replaced_is_taken_or_refused(path, start, length, piece):
    outcome(path, DIGITS[:start] + piece + DIGITS[start + length :])


@fuzz(100)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes_at_all_are_refused(path, content):
    refusal(path, content)


def bomb(levels: int = 12) -> str:
    """Nine times nine times nine ..., in a few lines."""
    lines = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(levels)]
    return "\n".join(["a0: &a0 [lol]", *lines, ""])


@pytest.mark.parametrize(
    ("old", "new"),
    [("gamma: 2.0", "gamma: *a12"), ("depths: [", "depths: [*a12, "), ("kept: [", "kept: [[*a12], ")],
)
def test_laughs_by_the_billion_are_shown_shortened(path, old, new):
    message = refusal(path, bomb() + DIGITS.replace(old, new, 1))
    assert "..." in message


def test_value_that_holds_itself_is_shown_shortened(path):
    assert "gamma: is [[[[...]]]], but" in refusal(path, DIGITS.replace("gamma: 2.0", "gamma: &a [*a]"))


@pytest.mark.parametrize(
    "tag", ["!!bool x", "!!int x", "!!timestamp x", "!!map x", "!!python/tuple [1]"]
)
def test_tag_that_its_value_does_not_fit_is_refused(path, tag):
    message = refusal(path, DIGITS.replace("gamma: 2.0", f"gamma: {tag}", 1))
    assert "correct it there" in message


def test_second_document_is_refused(path):
    assert "expected a single document" in refusal(path, DIGITS + "---\n" + DIGITS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_say_to_save_as_utf8(path, encoding):
    assert "save it as UTF-8" in refusal(path, DIGITS.replace("gamma", "gämma").encode(encoding))


def test_file_larger_than_parameters_are_is_not_read(path):
    path.write_text("#")
    os.truncate(path, 100 << 30)
    with bounded(), pytest.raises(ParamsError, match="it is over 64 KB"):
        load(path)


def test_largest_file_is_read_in_bounded_time(path):
    base_of_60 = "1:" * ((MAX_BYTES - len(DIGITS)) // 2 - 1)  # which YAML 1.1 would compute for seconds
    assert "gamma: is " in refusal(path, DIGITS.replace("2.0", f"{base_of_60}1", 1))


def test_pipe_is_not_waited_for(path):
    os.mkfifo(path)
    with bounded(seconds=5), pytest.raises(ParamsError, match="Not a plain file"):
        load(path)


def test_thousands_of_unknown_keys_are_counted_and_not_listed(path):
    message = refusal(path, DIGITS + "".join(f"k{n}: 1\n" for n in range(3000)))
    assert len(message.splitlines()) == config.MAX_PROBLEMS + 2
    assert f"and {3000 - config.MAX_PROBLEMS} more" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**63),
        ("data.split_seed", 2**63),
        ("gamma", 1e10),
        ("resnet.depth", 6 * 10**8 + 2),
        ("resnet.width", 10**9),
        ("policy_net.width", 10**9),
        ("pretrain.epochs", 10**18),
        ("pretrain.batch_size", 10**18),
        ("curriculum.epochs_per_block", 1e308),
        ("evaluate.bootstrap", 10**12),
        ("evaluate.shuffles", 10**12),
        ("benchmark.batch_sizes", [10**9]),
        ("benchmark.rounds", 10**9),
        ("sole.depths", [6 * 10**8 + 2]),
        ("resnet.mean", [1e300, 0.0, 0.0]),
        ("resnet.std", [1e-300, 1.0, 1.0]),
    ],
)
def test_number_that_no_machine_can_serve_names_its_bound(path, key, value):
    content = copy.deepcopy(VALUES)
    *section, last = key.split(".")
    (content[section[0]] if section else content)[last] = value
    message = refusal(path, yaml.safe_dump(content))
    assert f"  - {key}: is " in message
    assert "should be less than" in message or "should be greater than" in message


@pytest.mark.parametrize(
    "text", ['"a\\nerror: forged\\e[31m": 1', '"a\\e[31m": {"b\\nerror: c": 1}', "a: [\n"]
)
def test_every_line_of_a_refusal_is_ours(path, text):
    lines = refusal(path, f"{DIGITS}{text}\n").splitlines()
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("error") for line in lines)
