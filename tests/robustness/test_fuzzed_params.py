"""params.yaml of any content: parameters or one short message, soon and in little memory."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from fuzzing import MAX_MESSAGE, bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import Params, ParamsError, load

DIGITS = (Path(__file__).parents[2] / "presets" / "digits.yaml").read_text(encoding="utf-8")
VALUES: dict = yaml.safe_load(DIGITS)
SECTIONS = {name: values for name, values in VALUES.items() if isinstance(values, dict)}
KEYS = [(name, key) for name, values in SECTIONS.items() for key in values] + [(key,) for key in VALUES]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 8, 10**9, 10**18, 10**40, 1e300, -0.0, 1e9]),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
)
anything = st.one_of(
    scalars, st.lists(scalars, max_size=4), st.dictionaries(st.text(max_size=5), scalars, max_size=3)
)
written = st.sampled_from(
    ["!!bool x", "!!python/name:os.system", "=", "~", "&a [*a]", "*b", "0x1F", ".inf", "1_0",
     "'1'", "{", "]", "- 1", "!!binary a", "|"]
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
        assert len(message) < MAX_MESSAGE + len(str(path))
        return message


def refusal(path: Path, content: str | bytes) -> str:
    message = outcome(path, content)
    assert isinstance(message, str)
    return message


@fuzz(30)
@given(data=st.data())
def test_values_of_every_kind_in_every_place_are_taken_or_named(path, data):
    content = copy.deepcopy(VALUES)
    for *section, key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        values = content.get(section[0]) if section else content
        if not isinstance(values, dict) or key not in values:
            continue
        change = data.draw(st.sampled_from(["replace", "drop", "rename"]))
        old = values.pop(key)
        if change != "drop":
            name = data.draw(st.text(min_size=1, max_size=8)) if change == "rename" else key
            values[name] = old if change == "rename" else data.draw(anything)
    loaded = outcome(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    names = {".".join(key) for key in KEYS} - set(SECTIONS)
    assert isinstance(loaded, str) or set(loaded.flat()) == names


@fuzz(60)
@given(st.integers(0, len(DIGITS)), st.integers(0, 30), st.one_of(written, st.text(max_size=12)))
def test_text_with_a_piece_replaced_is_taken_or_refused(path, start, length, piece):
    outcome(path, DIGITS[:start] + piece + DIGITS[start + length :])


@fuzz(30)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes_at_all_are_refused(path, content):
    refusal(path, content)


def test_laughs_by_the_billion_are_shown_shortened(path):
    lines = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12)]
    bomb = "\n".join(["a0: &a0 [lol]", *lines, ""])
    assert "..." in refusal(path, bomb + DIGITS.replace("gamma: 2.0", "gamma: *a12", 1))


@pytest.mark.parametrize("value", ["!!bool x", "!!python/object/apply:os._exit [1]", "&a [*a]"])
def test_value_that_is_none_of_yamls_plain_ones_is_refused(path, value):
    refusal(path, DIGITS.replace("gamma: 2.0", f"gamma: {value}", 1))


def test_second_document_is_refused(path):
    assert "expected a single document" in refusal(path, DIGITS + "---\n" + DIGITS)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_say_to_save_as_utf8(path, encoding):
    assert "save it as UTF-8" in refusal(path, DIGITS.replace("gamma", "gämma").encode(encoding))


def test_file_larger_than_parameters_are_is_not_read(path):
    path.write_text("#")
    os.truncate(path, 100 << 30)
    with bounded(), pytest.raises(ParamsError, match="it is over 64 KB"):
        load(path)


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
        ("resnet.depth", 6 * 10**8 + 2),
        ("pretrain.epochs", 10**18),
        ("benchmark.batch_sizes", [10**9]),
        ("resnet.mean", [1e300, 0.0, 0.0]),
    ],
)
def test_number_that_no_machine_can_serve_names_its_bound(path, key, value):
    content = copy.deepcopy(VALUES)
    *section, last = key.split(".")
    (content[section[0]] if section else content)[last] = value
    message = refusal(path, yaml.safe_dump(content))
    assert f"  - {key}: is " in message
    assert "should be less than" in message


def test_every_line_of_a_refusal_is_ours(path):
    message = refusal(path, f'{DIGITS}"a\\nerror: forged\\e[31m": 1\n')
    assert all(line.isprintable() and not line.startswith("error") for line in message.splitlines())
