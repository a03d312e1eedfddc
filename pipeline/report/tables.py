"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells are Markdown: what must show as it is goes through `as_markdown` before."""
    return str(tabulate(list(rows), header, tablefmt="github", disable_numparse=True))
