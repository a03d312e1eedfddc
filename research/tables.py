"""Markdown tables, and cells with a mean over seeds."""

from collections.abc import Iterable, Sequence

import pandas as pd
from tabulate import tabulate


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a Markdown table; every number stays as its text was formatted."""
    return str(tabulate(list(rows), headers=headers, tablefmt="github", disable_numparse=True))


def mean_and_std(values: pd.Series, *, digits: int = 2, percent: bool = False) -> str:
    """`99.12 +- 0.08 %`; one value alone has no standard deviation."""
    scale, unit = (100, " %") if percent else (1, "")
    spread = f" +- {scale * values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{scale * values.mean():.{digits}f}{spread}{unit}"
