"""What comes from outside: files are read no further than they may be, values shown in a line."""

import errno
import io
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

LONGEST = 300  # characters of a value or a library's words in a message


def open_regular(path: Path, limit: int | None = None) -> io.BufferedReader:
    """Open a file, unless it has over `limit` bytes or is no plain file (a pipe is waited for for ever).

    Raises:
        OSError: it can't be opened; `strerror` says why.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a null character in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        what = os.strerror(code) if code == errno.EISDIR else "Not a plain file"
        raise OSError(code, what, str(path))
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"it is over {_size(limit)}", str(path))
    return path.open("rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes.

    Raises:
        OSError: it can't be read; `strerror` says why.
    """
    with open_regular(path, limit) as file:
        return file.read()  # with a number Python takes that much memory first


def read_json(path: Path, limit: int) -> Any:
    """A file of UTF-8 JSON in which no object has a key twice.

    Raises:
        OSError: it can't be read; `strerror` says why.
        ValueError: it is no such JSON.
    """
    try:
        return json.loads(read_bytes(path, limit).decode(), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def short_repr(value: object) -> str:
    """A value as Python writes it, shortened where it is long, deep or shared within itself."""
    return truncate(_SHORT.repr(value))


def truncate(text: object, length: int = LONGEST) -> str:
    """The beginning of a text that may be of any length."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[:length]}..."


def printable(text: object) -> str:
    """A text in one line that a terminal shows and does not obey: escaped as Python escapes it."""
    whole = str(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def _size(count: int) -> str:
    units = ((30, "GB"), (20, "MB"), (10, "KB"))
    return next((f"{count >> bits} {unit}" for bits, unit in units if count >> bits), f"{count} bytes")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{short_repr(twice)} stands twice in it")
    return found


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 10

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no number of over 4,300 digits
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a number of over 300 digits"


_SHORT = _Short()
