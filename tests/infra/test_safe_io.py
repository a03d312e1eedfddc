"""Files that are read no further than they may be, values that are shown in a line."""

from pathlib import Path

import pytest

from pipeline.infra.safe_io import (
    LONGEST,
    open_regular,
    printable,
    read_bytes,
    read_json,
    short_repr,
    truncate,
)


@pytest.mark.parametrize(
    "value",
    [[[["x" * 200] * 10] * 10] * 10, "x" * 10**6, {n: n for n in range(10**5)}, 10**5000],
    ids=["list", "text", "mapping", "number"],
)
def test_value_of_any_size_is_shown_in_a_line(value):
    assert 10 < len(short_repr(value)) <= LONGEST + 3


@pytest.mark.parametrize("value", [0.5, None, {"a": [1]}])
def test_short_value_is_shown_whole(value):
    assert short_repr(value) == repr(value)


def test_text_is_cut_where_it_is_too_long_alone():
    assert truncate("abc", 3) == "abc"
    assert truncate("abcd", 3) == "abc..."


@pytest.mark.parametrize(("limit", "words"), [(3, "it is over 3 bytes"), (2 << 10, "it is over 2 KB")])
def test_file_over_the_limit_is_refused_with_the_limit(tmp_path, limit, words):
    path = tmp_path / "a"
    path.write_bytes(bytes(limit))
    assert len(read_bytes(path, limit)) == limit
    path.write_bytes(bytes(limit + 1))
    with pytest.raises(OSError, match=words):
        read_bytes(path, limit)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "missing"])
def test_name_that_no_file_has_is_an_error_of_the_system(name):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        open_regular(Path(name))
    assert caught.value.strerror


@pytest.mark.parametrize("content", [b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", b"", b"1" * 5000])
def test_odd_json_is_a_value_error(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_json(path, 10**6)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hält /ok 7", "hält /ok 7"),
        ("a\x1b[31m", "a\\x1b[31m"),
        ("a\nerror: b", "a\\nerror: b"),
        ("a\u2028\x9b\u202e", "a\\u2028\\x9b\\u202e"),
        ("\udcff", "\\udcff"),
    ],
)
def test_text_is_printed_in_a_line_that_a_terminal_does_not_obey(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
