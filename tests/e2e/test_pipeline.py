"""DVC on a copy of the repository with tiny parameters: what runs, what does not, what it leaves.

The tests share one copy and run in file order; each leaves it with gamma 2 reproduced.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from repository_copy import TINY, Copy, environment, make_copy, ran

pytestmark = pytest.mark.e2e
GAMMA_STAGES = ["check", "finetune", "evaluate", "benchmark", "report"]
STATIC = {"static": {"rules": ["random"], "num_kept": [3]}}
STATIC_STAGES = ["sole@8", "static@random-3"]
TRAININGS = ["pretrain", "prune", "policy_pretrain", "curriculum"]
ALL_STAGES = [*GAMMA_STAGES, *STATIC_STAGES, *TRAININGS, "prepare", "baseline"]

# the stages that a comment in a module makes stale
STALE: dict[str, set[str]] = {
    "pipeline/infra/locks.py": set(),
    "pipeline/tracking/runs.py": set(),
    "pipeline/sources/cifar.py": {"prepare"},
    "pipeline/training/loop.py": {*TRAININGS, "finetune", "sole", "static"},
    "pipeline/policy/objectives.py": {"curriculum", "finetune"},
    "pipeline/flops.py": {"prune", "curriculum", "finetune", "evaluate", "baseline", "benchmark"},
    "pipeline/static_policies.py": {"curriculum", "static", "baseline"},
    "pipeline/evaluation/metrics.py": {"evaluate"},
    "pipeline/benchmark/runner.py": {"benchmark"},
    "pipeline/report/markdown.py": {"report"},
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return make_copy(tmp_path_factory.mktemp("copy"), changes=TINY | STATIC)


def test_one_command_runs_every_stage(copy):
    output = Copy(copy.folder, tracking=True).run("dvc", "repro")
    assert sorted(ran(output)) == sorted(ALL_STAGES)
    evaluated, baseline = copy.metrics("evaluate"), copy.metrics("baseline")
    assert set(evaluated) >= {
        "accuracy", "full_accuracy", "num_blocks", "blocks_mean", "blocks_std", "flops_mean",
        "flops_std", "full_flops", "flops_saved", "unique_policies", "effective_policies",
        "shuffled_accuracy", "best_single_policy_accuracy", "difficulty_spearman",
    }  # fmt: skip
    assert evaluated["full_accuracy"] == baseline["baseline"]["accuracy"]
    assert evaluated["full_flops"] == baseline["baseline"]["flops"]
    assert evaluated["num_blocks"] == 6
    assert evaluated["flops_saved"] == pytest.approx(
        1 - evaluated["flops_mean"] / evaluated["full_flops"]
    )
    benchmark = json.loads((copy.folder / "plots/benchmark/benchmark.json").read_text())
    assert [answer["batch"] for answer in benchmark["answers"]] == [4, 40]
    assert all(row["agreement"]["agrees"] for row in benchmark["times"] if row["kind"] == "blockdrop")
    report = (copy.folder / "report/report.md").read_text()
    assert "## Does it pay in time?" in report
    assert "Another machine" not in report
    assert f"{100 * evaluated['accuracy']:.2f} %" in report
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) >= 7
    html = (copy.folder / "report/report.html").read_text()
    assert html.count('src="data:image/svg+xml;') == len(pictures)
    assert "runs?workflowType=machine_learning" in output
    for name in pictures:
        assert (copy.folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-qm", "results")


@pytest.mark.serial
def test_a_second_repro_runs_nothing_and_is_about_as_quick_as_reading_the_map(copy):
    """In seconds of a processor, and as a ratio: machines differ, and may have other users."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ran(copy.run(*command)) == []
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    read_map = min(seconds("dvc", "stage", "list") for _ in range(2))
    assert min(seconds("dvc", "repro") for _ in range(2)) < 3 * read_map


def test_status_is_clean_beside_bytecode_and_editors_files(copy):
    for package in ("pipeline", "pipeline/policy", "stages"):  # DVC tracks the second as a folder
        assert list((copy.folder / package).glob("__pycache__/*.pyc"))
    assert copy.run("git", "status", "--porcelain") == ""
    editors = [copy.folder / "pipeline/policy" / name for name in (".learner.py.swp", "learner.py~")]
    for file in editors:
        file.touch()
    assert "up to date" in copy.run("dvc", "status")
    for file in editors:
        file.unlink()


AGAIN = """
from pipeline.config import load
from stages import baseline, curriculum, evaluate, finetune, prepare, pretrain, prune, sole, static
params = load()
for stage in (prepare, pretrain, prune, curriculum, finetune):
    stage.main(params)
sole.main(params, depth=8)
static.main(params, rule="random", num_kept=3)
for stage in (evaluate, baseline):
    stage.main(params)
"""


def test_stages_again_give_the_same_bytes(copy):
    before = copy.outs()
    output = copy.python(AGAIN)  # in one process, and DVC ran each in its own
    for training in ("pretrain", "curriculum", "finetune", "sole-8", "static-random-3"):
        assert f"{training} epoch 1/" in output  # no finished result is taken
    assert copy.outs() == before
    copy.run("dvc", "checkout", "--force")


def test_gamma_reruns_what_depends_on_it_and_going_back_reruns_nothing(copy):
    before = copy.outs(timed=True)
    assert sorted(ran(copy.run("dvc", "exp", "run", "-S", "gamma=5"))) == sorted(GAMMA_STAGES)
    assert copy.outs(timed=True) != before
    assert ran(copy.run("dvc", "exp", "run", "-S", "gamma=2.0")) == []
    assert copy.outs(timed=True) == before


STALE_STAGES = """
import json, sys
from pathlib import Path
from dvc.repo import Repo
stale = {}
for module in sys.argv[1:]:
    file, text = Path(module), Path(module).read_text()
    file.write_text(text + "# a comment\\n")
    with Repo() as repo:
        stale[module] = list(repo.status())
    file.write_text(text)
print("STALE" + json.dumps(stale))
"""


def test_comment_makes_only_dependent_stages_stale(copy):
    printed = copy.run(sys.executable, "-c", STALE_STAGES, *STALE)
    stale = json.loads(printed.split("STALE")[1])
    assert {module: {name.split("@")[0] for name in stale[module]} for module in STALE} == STALE


def test_another_depth_trains_that_one_alone(copy):
    text = (copy.folder / "params.yaml").read_text()
    (copy.folder / "params.yaml").write_text(re.sub(r"depths:\s*- 8", "depths:\n  - 8\n  - 20", text))
    would_run = ran(copy.run("dvc", "repro", "--dry"))
    copy.run("git", "checkout", "params.yaml")
    assert sorted(would_run) == ["baseline", "check", "report", "sole@20"]


def test_a_mistyped_parameter_stops_before_any_work(copy):
    before = copy.outs(timed=True)
    output = copy.run("dvc", "exp", "run", "-S", "+gama=7", check=False)
    copy.run("git", "checkout", "params.yaml")
    assert not output.startswith("exit 0")
    assert set(ran(output)) <= {"check"}
    assert "did you mean gamma?" in output
    assert "Traceback" not in output
    assert copy.outs(timed=True) == before


def test_scientific_notation_is_a_number(copy):
    output = copy.run("dvc", "exp", "run", "-S", "finetune_policy.lr=1e-5", "check")
    assert ran(output) == ["check"]
    assert "1e-05" in (copy.folder / "params.yaml").read_text()
    copy.run("git", "checkout", "params.yaml", "dvc.lock")


def test_a_killed_training_goes_on_and_ends_in_the_same_bytes(copy):
    before = copy.outs()
    train = [sys.executable, "-m", "stages.finetune"]
    killed = subprocess.Popen(train, cwd=copy.folder, env=environment())
    deadline = time.monotonic() + 120
    states = re.compile(r"finetune-\w+\.pt")  # not what a finished one leaves for others
    while not any(states.fullmatch(path.name) for path in (copy.folder / ".resume").iterdir()):
        assert time.monotonic() < deadline
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    output = copy.run(*train)
    assert re.search(r"resuming after epoch [12] of 3", output)
    assert copy.outs() == before
    suffixes = {"".join(path.suffixes) for path in (copy.folder / ".resume").iterdir()}
    # locks are empty files: to remove one would race with who waits for it; results go after a day
    assert suffixes == {".lock", ".finished.pt"}
    copy.run("dvc", "checkout", "--force")


def test_a_temporary_experiment_logs_to_the_main_checkout(copy):
    tracked = Copy(copy.folder, tracking=True)
    output = tracked.run("dvc", "exp", "run", "--temp", "-n", "three", "-S", "gamma=3")
    assert sorted(ran(output)) == sorted(GAMMA_STAGES)
    printed = copy.python(
        "import json, mlflow\n"
        "client = mlflow.MlflowClient('sqlite:///mlflow.db')\n"
        "ids = [e.experiment_id for e in client.search_experiments()]\n"
        "runs = client.search_runs(ids, max_results=1000)\n"
        "print('RUNS' + json.dumps([dict(id=r.info.run_id, name=r.info.run_name,"
        " status=r.info.status, parent=r.data.tags.get('mlflow.parentRunId'),"
        " params=r.data.params, metrics=r.data.metrics,"
        " artifacts=[a.path for a in client.list_artifacts(r.info.run_id)]) for r in runs]))\n"
    )
    runs = json.loads(printed.split("RUNS")[1])
    (parent,) = [r for r in runs if r["name"] == "three"]
    assert parent["params"]["gamma"] == "3"
    assert parent["metrics"].keys() >= {"accuracy", "blocks_mean", "baseline.accuracy"}
    assert "report" in parent["artifacts"]
    children = {r["name"] for r in runs if r["parent"] == parent["id"]}
    assert children == {"finetune", "evaluate", "benchmark", "report"}
    killed_before = [r for r in runs if r["status"] != "FINISHED"]
    assert killed_before == []


def test_importing_a_checkpoint_replaces_training(copy):
    copy.run(sys.executable, "-m", "tools.import_checkpoint", "models/pretrain", "pretrain")
    before = copy.outs()
    output = copy.run("dvc", "repro", "finetune")
    assert "pretrain: imported import/models-pretrain" in output
    after = copy.outs()
    for stage in ("pretrain", "finetune"):
        assert after[f"models/{stage}/model.safetensors"] == before[f"models/{stage}/model.safetensors"]
    assert copy.metrics("pretrain") == {"pretrain": {"imported": 1}}
    shown = json.loads(copy.run("dvc", "plots", "show", "--json"))
    assert not shown.get("errors"), shown["errors"]
