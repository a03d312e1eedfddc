"""docs/python.md: its lines run as they stand there, and print what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def run(monkeypatch):
    """Run the first `count` blocks of the page, as one Python session; its names."""
    monkeypatch.chdir(ROOT)

    def run(count: int) -> dict[str, object]:
        names: dict[str, object] = {}
        for block in BLOCKS[:count]:
            exec(block, names)
        return names

    return run


def test_three_lines_classify_an_image_and_show_its_blocks(run, capsys):
    assert len(BLOCKS[0].split("\n\n")) == 2  # the import apart
    assert len(list(filter(None, BLOCKS[0].splitlines()))) == 3
    run(1)
    (shown,) = re.findall(r"```\n(bird .*)\n```", PAGE)
    printed = capsys.readouterr().out.strip()
    # executors round differently, so the confidence may
    assert [printed.split()[0], *printed.split()[3:]] == [shown.split()[0], *shown.split()[3:]]


def test_the_other_lines_of_the_page_run(run):
    names = run(len(BLOCKS))
    assert len(names["predictions"]) == 100
    assert names["prediction"].pattern.count("#") == names["prediction"].blocks > 0
