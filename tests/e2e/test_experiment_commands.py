"""The commands of docs/experiments.md, on a copy whose map ends with prepare, which takes seconds."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from repository_copy import ROOT, TINY, Copy, make_copy, ran
from sandbox import environment

pytestmark = pytest.mark.e2e
PAGE = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
CHECK = (sys.executable, "-m", "tools.repair_dvc", "--check")
WRITE_AND_WAIT = """
import pathlib, time
curve = pathlib.Path("plots/sole/20.csv")
curve.parent.mkdir(parents=True, exist_ok=True)
curve.write_text("epoch,train_accuracy,validation_accuracy\\n1,0.5,0.4\\n2,0.75,0.5\\n")
print("READY", flush=True)
time.sleep(600)
"""


def documented(beginning: str) -> str:
    """The one command of the page that begins so."""
    (found,) = re.findall(rf"^(?:\| `)?({re.escape(beginning)}.*?)(?:` \|.*)?$", PAGE, re.MULTILINE)
    return found


def shell(copy: Copy, command: str, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=copy.folder, env=environment() | variables, text=True, shell=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def digest_of_data(copy: Copy) -> dict[str, str]:
    return {name: digest for name, digest in copy.outs().items() if name.startswith("data/")}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    """With the metrics of the repository's run beside prepare's; these results are not committed."""
    made = make_copy(tmp_path_factory.mktemp("copy"), changes=TINY)
    stages = yaml.safe_load((made.folder / "dvc.yaml").read_text())["stages"]
    others = [path.name for path in (ROOT / "metrics").glob("*.json") if path.name != "prepare.json"]
    write_map(made, {name: stages[name] for name in ("check", "prepare")}, others)
    made.run("git", "commit", "-qam", "map")
    (made.folder / "metrics").mkdir()
    for name in others:
        shutil.copyfile(ROOT / "metrics" / name, made.folder / "metrics" / name)
    made.run("dvc", "repro")
    return made


def write_map(copy: Copy, stages: dict, metrics: list[str]) -> None:
    content = {"stages": stages, "metrics": [f"metrics/{name}" for name in metrics]}
    (copy.folder / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_result_that_is_not_committed_is_named_with_the_command(copy):
    advice, command = copy.run(*CHECK).splitlines()
    assert advice.startswith("Commit this result before a sweep")
    assert command == '  git add dvc.lock metrics && git commit -m "results"'
    assert command.strip() == documented("git add ")
    shell(copy, command)
    assert copy.run(*CHECK) == ""
    copy.run("git", "add", "-A")  # the .gitignore files of a first run
    copy.run("git", "commit", "-qm", "rest")


def test_experiment_is_applied_and_left_again(copy):
    committed = digest_of_data(copy)
    way_back = documented("git checkout -- params.yaml")
    assert ran(copy.run("dvc", "exp", "run", "-n", "gamma-5", "-S", "data.split_seed=1"))
    experiment = digest_of_data(copy)
    assert experiment != committed
    assert "params.yaml" in copy.run(*CHECK).splitlines()[1]
    shell(copy, way_back)
    assert copy.run("git", "status", "--porcelain") == ""
    assert digest_of_data(copy) == committed
    shell(copy, documented("dvc exp apply"))
    assert digest_of_data(copy) == experiment
    assert ran(copy.run("dvc", "repro")) == []
    shell(copy, way_back)
    assert digest_of_data(copy) == committed
    assert ran(copy.run("dvc", "repro")) == []


def test_table_of_experiments_has_80_columns(copy):
    table = shell(copy, documented("dvc exp show"), COLUMNS="80")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    header = next(line.split() for line in table.splitlines() if "Experiment" in line)
    assert sorted(header) == ["Experiment", "accuracy", "blocks_mean", "flops_saved", "gamma"]
    (row,) = (line.split() for line in table.splitlines() if "[gamma-5]" in line)
    assert len(row) == 3 + 4  # a branch of the tree, a commit and a name
    assert "!" not in row


def test_experiment_becomes_a_branch_and_is_forgotten(copy):
    committed = digest_of_data(copy)
    shell(copy, documented("dvc exp branch"))
    shell(copy, "git checkout -q cheaper && dvc checkout")
    assert digest_of_data(copy) != committed
    shell(copy, "git checkout -q main && dvc checkout")
    assert digest_of_data(copy) == committed
    shell(copy, documented("dvc exp remove"))
    assert "gamma-5" not in copy.run("dvc", "exp", "list")


def test_curve_so_far_is_shown_while_dvc_runs_the_stage(copy):
    """Of a stage that writes two epochs and waits; tests/stages has the trainings that write so."""
    (copy.folder / "slow.py").write_text(WRITE_AND_WAIT)
    write_map(copy, {"slow": {"cmd": "python slow.py", "outs": ["plots/sole/20.csv"]}}, [])
    running = subprocess.Popen(
        ["dvc", "repro"], cwd=copy.folder, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        assert any(line == "READY\n" for line in running.stdout)
        shell(copy, documented("dvc plots show plots/"))
        page = (copy.folder / "dvc_plots/index.html").read_text()
        assert page.count('"epoch": ') == 2
        assert '"validation_accuracy": "0.5"' in page
        assert "function sketch(" in page  # .dvc/plots.html
        assert running.poll() is None
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
