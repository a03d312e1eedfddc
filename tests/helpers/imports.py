"""What the modules of this repository import of each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports_of(path: Path) -> set[str]:
    """Files of this repository that a file imports, anywhere in it, and C++ that it compiles."""
    files = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        files |= {name.replace(".", "/") + ".py" for name in names}
        if isinstance(node, ast.Constant) and str(node.value).endswith((".cpp", ".hpp")):
            files.add(path.with_name(node.value).relative_to(ROOT).as_posix())
    return {file for file in files if (ROOT / file).exists()}


def closure(file: str, *, beyond: frozenset[str] = frozenset()) -> set[str]:
    """All that a file imports, directly or not; what only files of `beyond` import is left out."""
    seen: set[str] = set()
    todo = {file}
    while todo:
        seen |= todo
        opened = [name for name in todo - beyond if name.endswith(".py")]
        todo = set().union(*(imports_of(ROOT / name) for name in opened)) - seen
    return seen
