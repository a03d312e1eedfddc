"""A study for real, with tiny parameters: its experiments are DVC's, and an interrupted one goes on."""

import json
import re
import signal
import sys

import pytest
from repository_copy import TINY, make_copy
from waiting import start, wait_for

pytest.importorskip("optuna", reason="Optuna, of the group study")
pytestmark = pytest.mark.sweep  # minutes, and `make sweep` installs the group
SMALL = TINY | {"static": {"rules": ["first"], "num_kept": [3]}, "finetune": {"epochs": 12}}
STUDY = (sys.executable, "-m", "tools.study", "--set", "gamma=1..10:log", "--budget", "3")
FINISHED = r"  ([\d.]+) % of the validation images correct, ([\d.]+) % of the FLOPs"


def test_trials_are_experiments_and_an_interrupted_one_goes_on(tmp_path):
    copy = make_copy(tmp_path, changes=SMALL)

    def experiments() -> list[str]:
        return copy.run("dvc", "exp", "list", "--name-only").split()

    interrupted = start(copy, *STUDY, "--trials", "1")
    log = copy.folder / "results/own/studies/study-search-0.log"
    wait_for(lambda: log.exists() and "finetune epoch 2/" in log.read_text(), 900)
    interrupted.send_signal(signal.SIGINT)
    output, _ = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, output
    assert experiments() == []
    assert not list((copy.folder / ".dvc/tmp/exps/standalone").glob("tmp*"))

    again = copy.run(*STUDY, "--trials", "1")
    assert experiments() == ["study-search-1"]
    gammas = [re.findall(r"gamma=\S+", text)[0] for text in (output, again)]
    assert gammas[0] == gammas[1]
    log = (copy.folder / "results/own/studies/study-search-1.log").read_text()
    assert "finetune: resuming after epoch" in log
    assert "Stage 'pretrain' is cached" in log

    ((accuracy, flops),) = re.findall(FINISHED, again)
    shown = copy.run("dvc", "exp", "show", "--json", "--no-pager")
    (metrics,) = set(re.findall(r'"finetune": ({"accuracy": [^}]*})', shown))
    assert float(accuracy) == pytest.approx(100 * json.loads(metrics)["accuracy"], abs=0.6)  # of 198
    (tested,) = set(re.findall(r'"flops_saved": ([-\d.]+)', shown))
    assert float(flops) == pytest.approx(100 * (1 - float(tested)), rel=0.1)  # of other images
    assert "study-search-1 " in again.partition("best trials")[2]
    assert "every trial is done" in copy.run(*STUDY, "--trials", "1")
    assert copy.run("git", "status", "--porcelain") == ""
