"""Markdown tables of means over seeds."""

import pandas as pd
import pytest

from pipeline.report.tables import markdown_table
from research import seeds
from research.tables import mean_and_std


def test_numbers_keep_their_format():
    text = markdown_table(["run", "accuracy"], [["one", "75.00 %"], ["two", "+0.10"]])
    header, _, *rows = [line.strip("|").split("|") for line in text.splitlines()]
    assert [cell.strip() for cell in header] == ["run", "accuracy"]
    assert [[cell.strip() for cell in row] for row in rows] == [["one", "75.00 %"], ["two", "+0.10"]]


@pytest.mark.parametrize(
    ("values", "options", "cell"),
    [
        ([0.5, 0.7], {"percent": True}, "60.00 +- 14.14 %"),
        ([1.0, 3.0], {"digits": 1}, "2.0 +- 1.4"),
        ([2.5], {"digits": 0}, "2"),
    ],
)
def test_mean_and_standard_deviation(values, options, cell):
    assert mean_and_std(pd.Series(values), **options) == cell


def test_table_has_one_row_for_each_gamma():
    row = dict.fromkeys(seeds.METRICS, 0.5)
    table = pd.DataFrame([{"gamma": gamma, **row} for gamma in (1.0, 1.0, 2.5)])
    lines = seeds.summary(table).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "2.5"]
    assert "| 50.00 +- 0.00 % " in lines[2]
    assert "| 0.50 +- 0.00 " in lines[2]
