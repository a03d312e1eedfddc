"""The house holds: imports point one way, and dvc.yaml lists what each stage's result depends on."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# What no result depends on: values stand in params.yaml alone (no schema field has a default), logging
# changes nothing, and a resumed training gives the bytes of an uninterrupted one (test_training).
NEUTRAL = {f"pipeline/{name}.py" for name in ("params", "resume", "locks", "errors")}
NEUTRAL |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/tracking").glob("*.py")}
MATHEMATICS = {
    "resnet", "policy_net", "policy_gradient", "policies", "curriculum", "cost", "tensors",
    "inference", "evaluation", "training", "policy_learning", "timing", "benchmark",
}  # fmt: skip
INPUT_OUTPUT = {"params", "data", "sources", "checkpoint", "legacy", "tracking", "resume", "figures"}


def imports_of(path: Path) -> set[str]:
    """Files of this repository that a file imports directly, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = name.replace(".", "/") + ".py"
            if (ROOT / file).exists():
                found.add(file)
        if isinstance(node, ast.Constant) and str(node.value).endswith((".cpp", ".hpp")):
            found.add(path.with_name(node.value).relative_to(ROOT).as_posix())  # compiled when it runs
    return found


def closure(file: str) -> set[str]:
    seen, todo = set(), {file}
    while todo:
        seen |= todo
        todo = set().union(*(imports_of(ROOT / f) for f in todo if f.endswith(".py"))) - seen
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_the_code_it_depends_on(stage):
    listed = {d for d in STAGES[stage]["deps"] if d.endswith((".py", ".cpp", ".hpp"))}
    needed = closure(f"stages/{stage}.py")
    if stage != "check":  # whose result does depend on the schema
        needed -= NEUTRAL
    else:
        needed -= {"pipeline/errors.py"}
    assert listed == needed


def test_no_parameter_has_a_default():
    from pipeline.params import Params, Section

    for section in [Params, *Section.__subclasses__()]:
        assert all(field.is_required() for field in section.model_fields.values()), section


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_mathematics_does_no_io(module):
    reached = {Path(f).parts[1].removesuffix(".py") for f in closure(f"pipeline/{module}.py")}
    assert not reached & INPUT_OUTPUT


def test_library_does_not_import_stages():
    for file in (ROOT / "pipeline").rglob("*.py"):
        assert not any(f.startswith("stages/") for f in imports_of(file)), file


@pytest.mark.parametrize("name", ["mlflow", "dvc"])
def test_one_folder_knows_mlflow_and_none_dvc(name):
    allowed = {"mlflow": {"pipeline/tracking"}, "dvc": set()}[name]
    for file in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            folder = file.parent.relative_to(ROOT).as_posix()
            assert folder in allowed or not any(n.split(".")[0] == name for n in names), file
