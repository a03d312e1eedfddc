"""What DVC records is what ran: a stage whose parameters, code or inputs change meanwhile refuses."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from repository_copy import ROOT, TINY, Copy, environment, make_copy, ran
from waiting import is_training, start, wait_for

from stages.support import inputs
from stages.support.inputs import ChangedError, FileState, StageInputs, require_unchanged

MAP = """
stages:
  pretrain:
    cmd: python -m stages.pretrain
    deps: [data/prepared, "${checkpoints.pretrain}", pipeline/net.py, stages/pretrain.py]
    params: [seed, pretrain]
    outs: [models/pretrain]
    metrics: [{metrics/pretrain.json: {cache: false}}]
  static:
    matrix: {rule: ["${rules}"], kept: [1]}
    cmd: python -m stages.static ${item.rule} ${item.kept}
    deps: [data/prepared]
    outs: ["models/static/${item.rule}-${item.kept}"]
  check:
    cmd: python -m stages.check
    deps: [stages/check.py]
    params: [{params.yaml: }]
    outs: [data/params.ok]
"""
PARAMS = {
    "seed": 0,
    "gamma": 2.0,
    "pretrain": {"lr": 0.1},
    "checkpoints": {"pretrain": "import/none"},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with what the map lists."""
    for name in (
        "data/prepared/images.npy", "data/prepared/.gitignore", "import/none", "pipeline/net.py",
        "stages/pretrain.py", "stages/check.py", "models/pretrain/weights", "metrics/pretrain.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dvc.yaml").write_text(MAP)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    return tmp_path


def begin(monkeypatch, stage="pretrain", *arguments):
    monkeypatch.setattr(inputs, "AT_START", StageInputs.of(stage, *arguments))


def set_params(**changes):
    Path("params.yaml").write_text("# edited\n" + yaml.safe_dump(PARAMS | changes))


def test_what_stays_is_no_change(project, monkeypatch):
    begin(monkeypatch)
    require_unchanged()
    (project / "pipeline/net.py").write_text("pipeline/net.py")  # saved again, or checked out
    (project / "data/prepared/.gitignore").write_text("written by DVC")
    (project / "pipeline/other.py").write_text("of other stages")
    set_params(gamma=5.0)  # of other stages, as is a comment
    require_unchanged()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: set_params(pretrain={"lr": 0.2}), r"pretrain\.lr was 0\.1, is 0\.2"),
        (lambda: set_params(seed=1), "seed was 0, is 1"),
        (lambda: set_params(pretrain={"epochs": 2}), r"pretrain\.lr was 0\.1, is None"),
        (lambda: Path("params.yaml").write_text("{half"), "params.yaml can't be read any more"),
        (lambda: Path("params.yaml").unlink(), "params.yaml can't be read any more"),
        (lambda: Path("pipeline/net.py").write_text("x = 1"), "pipeline/net.py was edited"),
        (lambda: Path("stages/pretrain.py").unlink(), "stages/pretrain.py is gone"),
        (lambda: Path("data/prepared/more.npy").write_text("x"), "data/prepared/more.npy is new"),
        (lambda: Path("data/prepared/images.npy").write_text("x"), "prepared/images.npy was edited"),
        (lambda: Path("import/none").write_text("x"), "import/none was edited"),
    ],
)  # fmt: skip
def test_a_change_is_refused_by_name_and_leaves_no_result(project, monkeypatch, change, message):
    begin(monkeypatch)
    change()
    with pytest.raises(ChangedError, match=message):
        require_unchanged()
    assert not (project / "models/pretrain").exists()
    assert not (project / "metrics/pretrain.json").exists()


def test_a_stage_that_depends_on_all_parameters_compares_all(project, monkeypatch):
    begin(monkeypatch, "check")
    set_params(gamma=5.0)
    with pytest.raises(ChangedError, match=r"gamma was 2\.0, is 5\.0"):
        require_unchanged()


@pytest.mark.parametrize(
    ("command", "outs"),
    [
        ("prepare", {"data/prepared", "metrics/prepare.json"}),
        ("sole 8", {"models/sole/8", "plots/sole/8.csv", "metrics/times/sole-8.json"}),
        ("report", {"report", "plots/trade_off.csv"}),
    ],
)
def test_the_projects_own_stages_know_their_outs(command, outs, monkeypatch):
    monkeypatch.chdir(ROOT)
    began = StageInputs.of(*command.split())
    assert {path.as_posix() for path in began.outs} == outs
    assert list(began.changes()) == []


def test_pipes_and_missing_inputs_are_no_change(project, monkeypatch):
    os.mkfifo(project / "data/prepared/pipe")
    (project / "import/none").unlink()
    begin(monkeypatch)
    require_unchanged()


def test_large_inputs_are_compared_by_size_time_and_inode(project, monkeypatch):
    monkeypatch.setattr(inputs, "READ_BYTES", 0)
    begin(monkeypatch)
    assert {state.digest for state in inputs.AT_START.files.values()} == {None}
    (project / "data/prepared/images.npy").write_text("data/prepared/imageS.npy")
    with pytest.raises(ChangedError, match=r"images\.npy was edited"):
        require_unchanged()


def test_content_of_an_unread_file_is_not_asked_for(tmp_path):
    (tmp_path / "file").write_text("a")
    state = FileState.of(tmp_path / "file", read=False)
    assert state.holds(tmp_path / "file")
    (tmp_path / "file").write_text("ab")
    assert not state.holds(tmp_path / "file")


LONG = TINY | {"pretrain": {"epochs": 60}}


@pytest.fixture
def copy(tmp_path) -> Copy:
    return make_copy(tmp_path, changes=LONG)


def edit(path: Path, before: str, after: str) -> None:
    """At its first place: pretrain comes before what has the same values."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def learning_rate(copy: Copy) -> float:
    recorded = yaml.safe_load((copy.folder / "dvc.lock").read_text())["stages"]["pretrain"]
    return recorded["params"]["params.yaml"]["pretrain"]["lr"]


@pytest.mark.e2e
def test_a_learning_rate_edited_meanwhile_is_not_recorded(copy):
    params = copy.folder / "params.yaml"
    before, after = "  optimizer: sgd\n  lr: 0.1\n", "  optimizer: sgd\n  lr: 0.2\n"
    repro = start(copy, "dvc", "repro", "pretrain")
    wait_for(lambda: is_training(copy, "pretrain"))
    edit(params, before, after)
    printed, _ = repro.communicate(timeout=300)
    assert repro.returncode != 0
    assert "pretrain.lr was 0.1, is 0.2" in printed
    locked = (copy.folder / "dvc.lock").read_text() if (copy.folder / "dvc.lock").exists() else ""
    assert "models/pretrain" not in locked
    edit(params, after, before)
    again = copy.run("dvc", "repro", "pretrain")
    assert "resuming after epoch" in again
    assert learning_rate(copy) == 0.1
    of_first = copy.outs()["models/pretrain/model.safetensors"]
    edit(params, before, after)
    assert "pretrain" in ran(copy.run("dvc", "repro", "pretrain"))
    assert learning_rate(copy) == 0.2
    assert copy.outs()["models/pretrain/model.safetensors"] != of_first
    edit(params, after, before)
    copy.run("dvc", "repro", "pretrain")  # from the run cache
    assert copy.outs()["models/pretrain/model.safetensors"] == of_first


@pytest.mark.e2e
def test_code_edited_meanwhile_is_not_recorded(copy):
    repro = start(copy, "dvc", "repro", "pretrain")
    wait_for(lambda: is_training(copy, "pretrain"))
    (copy.folder / "params.yaml").open("a").write("# a comment\n")
    with (copy.folder / "pipeline/training/loop.py").open("a") as file:
        file.write("# edited\n")
    printed, _ = repro.communicate(timeout=300)
    assert repro.returncode != 0
    assert "pipeline/training/loop.py was edited" in printed
    assert "params.yaml" not in printed.split("was changed while it ran")[1].split("Put it back")[0]
    assert "epoch 1/60" in copy.run("dvc", "repro", "pretrain")  # the new code's own training


@pytest.mark.e2e
def test_an_experiment_is_refused_likewise(copy):
    run = start(copy, "dvc", "exp", "run", "-S", "pretrain.lr=0.7", "pretrain")
    wait_for(lambda: is_training(copy, "pretrain"))
    edit(copy.folder / "params.yaml", "lr: 0.7", "lr: 0.8")
    printed, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "pretrain.lr was 0.7, is 0.8" in printed


@pytest.mark.e2e
def test_every_stage_refuses(copy):
    """By a stage that ends at once: each script has the frame."""
    copy.run("dvc", "repro", "prepare")
    code = (
        "import runpy, sys; sys.orig_argv = ['python', '-m', 'stages.{0}', *sys.argv[1:]]; "
        "import stages; "
        "from pipeline import config; from pathlib import Path; real = config.load\n"
        "def load():\n"
        "    values = real(); Path('{1}').open('a').write('# edited\\n'); return values\n"
        "config.load = load; runpy.run_module('stages.{0}', run_name='__main__')"
    )
    for stage in yaml.safe_load((copy.folder / "dvc.yaml").read_text())["stages"]:
        edited = f"stages/{stage}.py"
        words = {"sole": ["8"], "static": ["first", "3"]}.get(stage, [])
        done = subprocess.run(
            ["python", "-c", code.format(stage, edited), *words], cwd=copy.folder, env=environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert f"{edited} was edited" in done.stderr
