"""Packages import one way, and dvc.yaml lists what each stage's result depends on."""

import ast
import graphlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import closure, imports_of

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CODE = ("pipeline/", "stages/")
MAX_PACKAGES = 26
MAX_LINES_OF_DVC_YAML = 200
LONG_FUNCTION = 50  # lines
MAX_LONG_FUNCTIONS = 5
TOP_FOLDERS = ("pipeline", "stages", "tools", "research")


def files_in(*names: str) -> set[str]:
    """Files of packages and modules, as paths from the root; not the empty __init__.py."""
    paths = [ROOT / name for name in names]
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
    kinds = (".py", ".cpp", ".hpp")
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.suffix in kinds and file.name != "__init__.py"
    }


# What no result depends on: values stand in params.yaml alone (no field of the schema has a default),
# logging and showing change nothing, a resumed training gives the bytes of an uninterrupted one
# (training/test_loop.py), and several processes or threads give what one gives, but for float noise
# (test_distributed.py).
NEUTRAL = files_in("pipeline/config.py", "pipeline/infra", "pipeline/tracking", "stages/support")
NEUTRAL -= {f"stages/support/{name}.py" for name in ("common", "compatibility", "recipes", "training")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_every_module_of_what_it_lists_and_nothing_else(stage):
    listed = files_in(*(name for name in STAGES[stage]["deps"] if name.startswith(CODE)))
    # the result of check is that the schema accepts params.yaml
    neutral = NEUTRAL - ({"pipeline/config.py"} if stage == "check" else set())
    imported = closure(f"stages/{stage}.py", beyond=frozenset(neutral)) - neutral
    imported = {name for name in imported if not name.endswith("__init__.py")}
    assert listed == imported


def test_dvc_yaml_fits_on_a_few_screens():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= MAX_LINES_OF_DVC_YAML


def test_dvc_starts_every_stage_without_a_shell_between():
    """Else a stage would not notice that DVC was killed (`signals.exit_with_parent`)."""
    for stage, body in STAGES.items():
        assert body["cmd"].startswith(f"exec python -m stages.{stage}")


@pytest.mark.parametrize("stage", [name for name, body in STAGES.items() if "matrix" in body])
def test_stage_of_a_matrix_names_all_its_keys_wherever_it_writes(stage):
    """Else two of its items would write one file."""
    keys = [f"${{item.{key}}}" for key in STAGES[stage]["matrix"]]
    for text in (STAGES[stage]["cmd"], *STAGES[stage]["outs"]):
        assert all(key in text for key in keys), text


def test_sole_follows_the_whole_recipe_of_pretrain_and_static_that_of_finetune():
    """And neither a policy's: its learning rate makes no static network stale."""
    assert {p for p in STAGES["sole"]["params"] if p.startswith("pretrain")} == {"pretrain"}
    assert {p for p in STAGES["static"]["params"] if p.startswith("finetune")} == {"finetune"}


def test_imported_trainings_have_the_columns_that_are_drawn():
    from stages.support.training import COLUMNS

    for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]:
        for body in plot.values() if isinstance(plot, dict) else ():
            for file, drawn in body["y"].items():
                if Path(file).stem in COLUMNS:
                    names = {drawn} if isinstance(drawn, str) else set(drawn)
                    assert names | {body["x"]} <= set(COLUMNS[Path(file).stem]), file


def dotted_names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from dotted_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_no_metric_has_the_name_of_a_parameter():
    """`dvc exp show` puts the file before such a name, and a selection by the name finds nothing."""
    parameters = set(dotted_names(yaml.safe_load((ROOT / "params.yaml").read_text())))
    files = list((ROOT / "metrics").glob("*.json"))
    assert files
    for file in files:
        assert not parameters & set(dotted_names(json.loads(file.read_text()))), file.name


def test_no_parameter_has_a_default():
    from pipeline.config import Network, Params, Section

    for section in [Params, *Section.__subclasses__(), *Network.__subclasses__()]:
        assert all(field.is_required() for field in section.model_fields.values()), section


def package_of(file: str) -> str:
    """The package of a file, or the file itself where it lies in pipeline/."""
    path = Path(file)
    is_module = path.parent.as_posix() == "pipeline"
    return path.with_suffix("").as_posix() if is_module else path.parent.as_posix()


def package_imports() -> dict[str, set[str]]:
    """For each package of pipeline, stages, tools and research the packages that it imports."""
    packages: dict[str, set[str]] = {}
    for file in files_in(*TOP_FOLDERS):
        if file.endswith(".py"):
            imported = {package_of(f) for f in imports_of(ROOT / file) if not f.endswith("__init__.py")}
            packages.setdefault(package_of(file), set()).update(imported - {package_of(file)})
    return packages


def test_packages_are_few_and_make_no_circle():
    packages = package_imports()
    graphlib.TopologicalSorter(packages).prepare()  # raises CycleError
    assert len(packages) <= MAX_PACKAGES, sorted(packages)


def test_modules_make_no_circle():
    files = {f for f in files_in(*TOP_FOLDERS) if f.endswith(".py")}
    imports = {file: imports_of(ROOT / file) for file in files}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_the_library_imports_no_stage_and_no_stage_a_tool():
    for package, imported in package_imports().items():
        level = TOP_FOLDERS.index(package.split("/")[0])
        assert all(TOP_FOLDERS.index(other.split("/")[0]) <= level for other in imported), package


MATHEMATICS = ("models", "policy", "training", "inference", "evaluation", "benchmark")


@pytest.mark.parametrize("package", MATHEMATICS)
def test_the_mathematics_reads_and_writes_no_data_set(package):
    allowed = {"pipeline/data/split.py", "pipeline/data/transforms.py"}
    for file in files_in(f"pipeline/{package}"):
        imported = closure(file) if file.endswith(".py") else set()
        data = {f for f in imported if f.startswith(("pipeline/data/", "pipeline/sources/"))}
        assert data <= allowed
        assert not {f for f in imported if f.startswith("pipeline/tracking/")}


@pytest.mark.parametrize(
    ("name", "packages"), [("mlflow", {"pipeline/tracking", "pipeline/serving"}), ("dvc", set())]
)
def test_two_packages_know_mlflow_and_none_dvc(name, packages):
    for file in files_in("pipeline", "stages"):
        if not file.endswith(".py") or package_of(file) in packages:
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(n.split(".")[0] == name for n in names), file


def test_few_functions_are_long():
    long = [
        f"{file}: {node.name}"
        for file in sorted(files_in(*TOP_FOLDERS))
        if file.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > LONG_FUNCTION
    ]
    assert len(long) <= MAX_LONG_FUNCTIONS, long
