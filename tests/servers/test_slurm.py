"""Experiments as jobs of a real SLURM cluster of two nodes: submitted, killed, requeued, collected."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
import yaml
from repository_copy import TINY, Copy, make_copy
from sandbox import environment
from waiting import wait_for

pytestmark = pytest.mark.slow
BENCHMARK = {
    "batch_sizes": [4],
    "executors": ["masked"],
    "keep_ratios": [0.5, 1.0],
    "rounds": 5,
    "seconds": 10,
}
SHORT = TINY | {"finetune": {"epochs": 2}, "static": {"rules": ["first"], "num_kept": [3]},
                "benchmark": BENCHMARK}  # fmt: skip
SUBMIT = (sys.executable, "-m", "tools.submit")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def cluster(home) -> Iterator[dict[str, str]]:
    with servers.slurm(home) as variables:
        yield variables


@pytest.fixture(scope="module")
def project(home, cluster) -> Copy:
    """A clone with a Git remote and a DVC remote, which have all but the results."""
    folder = home / "project"
    folder.mkdir()
    copy = make_copy(folder, changes=SHORT)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    for line in (
        f"dvc remote add -d store {home}/store",
        "git add -A",
        "git commit -qm remotes",
        f"git clone -q --bare . {home}/origin.git",
        f"git remote add origin {home}/origin.git",
        "git fetch -q origin",
    ):
        copy.run(*line.split())
    return copy


def run(project: Copy, cluster: dict[str, str], *command: str) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=project.folder, env=environment() | cluster, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_experiments_run_on_the_nodes_and_come_back(project, cluster, home):
    status, output = run(project, cluster, *SUBMIT, "gamma=3", "gamma=4 seed=1", "--sbatch=--time=60")
    assert status == 0, output
    jobs = re.findall(r"^([\w.-]+): job (\d+), (\S+)$", output, re.MULTILINE)
    assert [name for name, _, _ in jobs] == ["gamma-3", "gamma-4-seed-1"]
    logs = {name: project.folder / log for name, _, log in jobs}

    def has_ended(job: tuple[str, str, str]) -> bool:
        return job[1] not in run(project, cluster, "squeue", "--noheader", "--format=%i")[1].split()

    # the first job's training is killed with everything that it started, and SLURM starts the job again
    clone = project.folder / ".jobs/gamma-3"
    wait_for(lambda: any((clone / ".resume").glob("*.pt")) or has_ended(jobs[0]), seconds=400)
    assert not has_ended(jobs[0]), logs["gamma-3"].read_text()
    assert run(project, cluster, "scontrol", "requeue", jobs[0][1])[0] == 0
    # a job that was requeued waits for two minutes by itself
    assert run(project, cluster, "scontrol", "update", f"jobid={jobs[0][1]}", "starttime=now")[0] == 0

    wait_for(lambda: run(project, cluster, "squeue", "--noheader")[1] == "", seconds=800)
    for name, log in logs.items():
        assert f"Ran experiment(s): {name}" in log.read_text(), log.read_text()
        assert not (project.folder / ".jobs" / name).exists()
    assert "resuming after epoch" in logs["gamma-3"].read_text()

    project.run("dvc", "exp", "pull", "origin", *logs)
    listed = project.run("dvc", "exp", "show", "--csv", "-A")
    assert all(name in listed for name in logs)
    project.run("dvc", "exp", "apply", "gamma-4-seed-1")
    assert yaml.safe_load((project.folder / "params.yaml").read_text())["gamma"] == 4

    status, output = run(project, cluster, *SUBMIT, "gamma=3")
    assert status == 1
    project.run("git", "reset", "-q", "--hard")
    assert run(project, cluster, *SUBMIT, "gamma=3") == (
        1,
        "error: origin has an experiment gamma-3 already; `dvc exp pull origin gamma-3` brings it\n",
    )


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        ("true", ["gamma"], "'gamma' is no PARAMETER=VALUE"),
        ("true", ["gamma=-7"], "gamma"),
        ("true", ["gama=7"], "gama"),
        ("true", ["gamma=1", "gamma=1"], "both named gamma-1"),
        ("sed -i 's/^gamma:.*/gamma: 3/' params.yaml", ["gamma=7"], "params.yaml differs from"),
        ("git commit -q --allow-empty -m new", ["gamma=7"], "is not on origin, where jobs take it from"),
        ("git remote remove origin", ["gamma=7"], "there is no Git remote origin"),
        ("mkdir -p .jobs/gamma-7", ["gamma=7"], "is of a job that has not ended"),
        ("git rm -q --cached .dvc/config && rm .dvc/config && git commit -qm none && git push -q",
         ["gamma=7"], "no DVC remote is committed as the default"),
    ],
)  # fmt: skip
def test_what_could_not_come_back_is_not_submitted(project, cluster, tmp_path, prepare, words, message):
    origin, clone = tmp_path / "origin.git", tmp_path / "clone"
    project.run("git", "clone", "-q", "--bare", ".", str(origin))
    project.run("git", "clone", "-q", str(origin), str(clone))
    copy = Copy(clone)
    copy.run("git", "config", "user.email", "test@example.org")
    copy.run("git", "config", "user.name", "test")
    copy.run("bash", "-c", prepare)
    status, output = run(copy, cluster, *SUBMIT, *words)
    assert status == 1
    assert output.startswith("error: ")
    assert message in output
    assert run(copy, cluster, "squeue", "--noheader")[1] == ""


def test_without_slurm_one_machine_has_the_queue(project, tmp_path):
    (tmp_path / "git").symlink_to("/usr/bin/git")
    variables = environment() | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [*SUBMIT, "gamma=3"], cwd=project.folder, env=variables, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "`dvc exp run --queue`" in done.stderr
