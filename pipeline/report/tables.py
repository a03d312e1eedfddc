"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown: what must show as it is goes through `as_markdown` before."""
    text: str = tabulate(list(rows), header, tablefmt="github", disable_numparse=True)
    return text
