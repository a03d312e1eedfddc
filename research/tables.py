"""Cells of tables with a mean over seeds."""

import pandas as pd


def mean_and_std(values: pd.Series, *, digits: int = 2, percent: bool = False) -> str:
    """`99.12 +- 0.08 %`; one value alone has no standard deviation."""
    scale, unit = (100, " %") if percent else (1, "")
    spread = f" +- {scale * values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{scale * values.mean():.{digits}f}{spread}{unit}"
