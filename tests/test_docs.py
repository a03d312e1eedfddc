"""What the documents promise holds: sizes, links, tests that are named, the picture of the stages."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAULTS = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
FOLDERS = (".", "docs", "results", "pretrained")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
ENDINGS = ("csv", "html", "json", "md", "py", "yaml")  # of files that are named as sections are


def fault_rows() -> dict[str, list[list[str]]]:
    """The rows of each section's table that name a test, by the section's heading."""
    tables = {}
    for section in FAULTS.split("\n## ")[1:]:
        lines = section.splitlines()
        rows = [line for line in lines if line.startswith("|") and "tests/" in line]
        tables[lines[0]] = [row.strip("| ").split(" | ") for row in rows]
    return tables


def test_readme_is_short():
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document_names_what_exists(document):
    """Links lead to files; modules, targets of the Makefile and parameters are there."""
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target
    for name in re.findall(r"python -m ((?:stages|tools|research)\.\w+)", text):
        assert name == "stages.NAME" or (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"(?:`|^|&& )make ([a-z][\w-]*)", text, flags=re.MULTILINE):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name
    for section, key in re.findall(rf"(?<![\w./])({'|'.join(PARAMS)})\.([a-z_]+)\b", text):
        assert key in ENDINGS or key in PARAMS[section], f"{section}.{key}"


def test_index_has_every_document():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def test_paths_in_readme_and_contributing_exist():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for name in re.findall(r"`((?:pipeline|stages|tests|tools|research)/[\w/]+(?:\.py)?/?)`", text):
            assert (ROOT / name).exists(), name


def test_picture_of_the_stages_is_the_map():
    """The arrows of README's picture lead to the same stages as the files that dvc.yaml names."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    writers = {}
    for name, body in stages.items():
        metrics = [next(iter(m)) if isinstance(m, dict) else m for m in body.get("metrics", ())]
        for out in (*body.get("outs", ()), *metrics):
            writers[re.split(r"/?\$\{item|-\$\{item", out)[0]] = name
    reads: dict[str, set[str]] = {name: set() for name in stages}
    for name, body in stages.items():
        for dep in body["deps"]:
            reads[name] |= {w for out, w in writers.items() if f"{out}/".startswith(f"{dep}/")}
        reads[name] -= {name}
    (picture,) = re.findall(r"```mermaid\n(.*?)```", README, flags=re.DOTALL)
    drawn: dict[str, set[str]] = {name: set() for name in stages}
    for line in picture.splitlines():
        for before, after in itertools.pairwise(line.strip().split(" --> ")):
            drawn[after].add(before)
    assert {n: _ancestors(n, drawn) for n in stages} == {n: _ancestors(n, reads) for n in stages}


def _ancestors(name: str, parents: dict[str, set[str]]) -> set[str]:
    return parents[name].union(*(_ancestors(parent, parents) for parent in parents[name]))


def test_every_fault_has_what_happens_and_one_test_that_exists():
    defined = {}
    for section, rows in fault_rows().items():
        pairs = [(row[0], row[2]) for row in rows]
        assert len(set(pairs)) == len(pairs), section  # none stands twice
        for row in rows:
            assert len(row) == 3, (section, row)
            named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[2])
            assert named, (section, row)
            file, test = named.groups()
            if file not in defined:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in defined[file], (section, row)
