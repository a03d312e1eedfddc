"""The house holds: imports point one way, and dvc.yaml lists what each stage's result depends on."""

import ast
import graphlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# What no result depends on: values stand in params.yaml alone (no schema field has a default), logging
# and showing change nothing, a resumed training gives the bytes of an uninterrupted one (test_training),
# and several processes or threads give what one gives, but for float noise (test_distributed).
NEUTRAL = {
    f"pipeline/{name}.py"
    for name in ("params", "resume", "locks", "errors", "files", "untrusted", "pickles", "interruption")
}
NEUTRAL |= {"pipeline/processes.py", "pipeline/spared_cores.py"}
NEUTRAL |= {"stages/keeping.py", "stages/launch.py", "stages/progress.py"}
NEUTRAL |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/tracking").glob("*.py")}
MATHEMATICS = {
    "resnet", "policy_net", "policy_gradient", "policies", "curriculum", "cost", "tensors",
    "inference", "evaluation", "training", "policy_learning", "static_policies", "timing", "benchmark",
}  # fmt: skip
INPUT_OUTPUT = {
    "params", "data", "prepared", "sources", "checkpoint", "legacy", "tracking", "resume", "figures",
}  # fmt: skip


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


def closure(file: str, *, beyond: frozenset[str] = frozenset()) -> set[str]:
    """All that a file imports, directly or not; imports of `beyond` count only if others need them."""
    seen, todo = set(), {file}
    while todo:
        seen |= todo
        opened = [f for f in todo - beyond if f.endswith(".py")]
        todo = set().union(*(imports_of(ROOT / f) for f in opened)) - seen
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_the_code_it_depends_on(stage):
    listed = {d for d in STAGES[stage]["deps"] if d.endswith((".py", ".cpp", ".hpp"))}
    needed = closure(f"stages/{stage}.py", beyond=frozenset(NEUTRAL))
    if stage != "check":  # whose result does depend on the schema
        needed -= NEUTRAL
    else:
        needed -= NEUTRAL - {"pipeline/params.py"}
    assert listed == needed


@pytest.mark.parametrize("stage", [name for name, body in STAGES.items() if "matrix" in body])
def test_stage_of_a_matrix_names_all_its_keys_wherever_it_writes(stage):
    """Else two of its items would write one file."""
    keys = [f"${{item.{key}}}" for key in STAGES[stage]["matrix"]]
    for text in (STAGES[stage]["cmd"], *STAGES[stage]["outs"]):
        assert all(key in text for key in keys), text


def test_sole_and_static_depend_on_the_fields_of_the_recipe_that_they_follow():
    """Not on the whole section: importing for pretrain or a policy's learning rate changes nothing."""
    from pipeline.params import Finetune, Pretrain

    recipe = {f"pretrain.{name}" for name in Pretrain.model_fields} - {"pretrain.checkpoint"}
    assert {p for p in STAGES["sole"]["params"] if p.startswith("pretrain")} == recipe
    of_policy = {
        "checkpoint", "estimator", "alpha", "entropy_weight", "entropy_schedule", "diversity_weight",
        "hold_epochs", "policy_epochs", "policy_lr",
    }  # fmt: skip
    recipe = {f"finetune.{name}" for name in Finetune.model_fields.keys() - of_policy}
    assert {p for p in STAGES["static"]["params"] if p.startswith("finetune")} == recipe


def test_imported_trainings_have_the_columns_that_are_drawn():
    from stages.trainer import COLUMNS

    for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]:
        for body in plot.values() if isinstance(plot, dict) else ():
            for file, drawn in body["y"].items():
                if Path(file).stem in COLUMNS:
                    names = {drawn} if isinstance(drawn, str) else set(drawn)
                    assert names | {body["x"]} <= set(COLUMNS[Path(file).stem]), file


def test_no_parameter_has_a_default():
    from pipeline.params import Params, Section

    for section in [Params, *Section.__subclasses__()]:
        assert all(field.is_required() for field in section.model_fields.values()), section


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_mathematics_does_no_io(module):
    reached = {Path(f).parts[1].removesuffix(".py") for f in closure(f"pipeline/{module}.py")}
    assert not reached & INPUT_OUTPUT


def test_imports_make_no_circle():
    files = [f for folder in ("pipeline", "stages", "tools") for f in (ROOT / folder).rglob("*.py")]
    imports = {file.relative_to(ROOT).as_posix(): imports_of(file) for file in files}
    imports["pipeline/resnet.py"].remove("pipeline/imagenet_resnet.py")  # made when it is asked for
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


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
