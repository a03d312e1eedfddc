"""What the documents say of the tests is true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py)::(\w+)`", FAULTS)))


def tables() -> dict[str, list[list[str]]]:
    """The rows of each section's table that name a test, by the section's heading."""
    found = {}
    for section in FAULTS.split("\n## ")[1:]:
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "tests/" in line]
        found[section.splitlines()[0]] = rows
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_the_faults_name_is_there(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name for of, name in NAMED if of == file} <= there


def test_every_row_of_the_faults_has_a_fault_what_happens_and_one_test():
    for section, rows in tables().items():
        for row in rows:
            assert len(row) == 3, (section, row)
            assert re.fullmatch(r"`tests/\w+\.py::test_\w+`", row[2]), (section, row)


def test_no_fault_stands_twice():
    for section, rows in tables().items():
        tests = [row[2] for row in rows]
        assert len(set(tests)) == len(tests), (section, {t for t in tests if tests.count(t) > 1})


def test_at_least_forty_kinds_of_bad_input_are_held():
    assert len(tables()["Bad input"]) >= 40
