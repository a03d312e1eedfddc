"""Random damage to files and JSON, and files that are no plain ones."""

import os
from pathlib import Path

from hypothesis import strategies as st

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, -1]),
        st.floats(),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """The content with some bytes changed, cut off, taken out or put in."""
    at = data.draw(st.integers(0, len(content) - 1))
    few = data.draw(st.binary(min_size=1, max_size=8))
    kind = data.draw(st.sampled_from(["cut", "change", "take", "put", "flip"]))
    if kind == "flip":
        few = bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))])
    ends = {"cut": len(content), "take": at + len(few), "put": at}
    middle = few if kind in ("change", "put", "flip") else b""
    return content[:at] + middle + content[ends.get(kind, at + len(few)) :]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return Path.mkdir, (self.ran,)


def links_to(target: str):
    return lambda path: path.symlink_to(target)


def is_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
