"""Studies: what is searched, pruned, failed, interrupted and taken up; experiments are stand-ins here.

tests/e2e/test_study.py runs real ones.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_split, pair_between_paths, small_pair

from pipeline.infra.errors import UserError
from pipeline.serving.predictor import Predictor
from stages.support.progress import Progress
from tools import study as module
from tools.study import EPOCH, TrialError, run_experiment, space_of, worth_of

optuna = pytest.importorskip("optuna", reason="Optuna, of the group study")
pytestmark = pytest.mark.slow  # `make slow` installs that group
ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "presets/digits.yaml"
GAMMA = ("--set", "gamma=1..20:log")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    shutil.copyfile(PARAMS, tmp_path / "params.yaml")
    (tmp_path / "results/own").mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def epoch(stage: str, number: int, accuracy: float, blocks: float, epochs: int = 3) -> re.Match[str]:
    line = f"{stage} epoch {number}/{epochs}: accuracy {accuracy:g}, reward 0.1, blocks {blocks:g}, "
    matched = EPOCH.match(line + "unique_policies 4, active_blocks 15, 00:01 elapsed, 00:02 left")
    assert matched
    return matched


class Experiments:
    """Stand-ins by number: what each reports of its epochs, what it is worth, or how it ends."""

    def __init__(self) -> None:
        self.settings: dict[str, list[str]] = {}
        self.epochs = lambda name: [(0.9, 6.0)]
        self.measures = lambda name: (0.9, 0.5)
        self.end = lambda name: None

    def run(self, name, settings, log, on_epoch) -> None:
        self.settings[name] = settings
        for number, (accuracy, blocks) in enumerate(self.epochs(name), 1):
            on_epoch(epoch("finetune", number, accuracy, blocks))
        if (error := self.end(name)) is not None:
            raise error

    def measure(self, name, baseline) -> dict[str, float]:
        return dict(zip(module.MEASURES, (*self.measures(name), 0.8, 0.55), strict=True))

    def gammas(self) -> list[str]:
        return [
            next(s for s in settings if s.startswith("gamma=")) for settings in self.settings.values()
        ]


@pytest.fixture
def experiments(folder, monkeypatch) -> Experiments:
    made = Experiments()
    monkeypatch.setattr(module, "run_experiment", made.run)
    monkeypatch.setattr(module, "measure_experiment", made.measure)
    return made


@pytest.fixture
def start(experiments, monkeypatch, capsys):
    """Run the command; what it printed, and how it ended."""

    def start(*words: str) -> tuple[str, object]:
        monkeypatch.setattr(sys, "argv", ["study", *words])
        status: object = 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            module.main()
        except SystemExit as error:
            status = error.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out, status

    return start


def trials(name: str = "search") -> list:
    return optuna.load_study(study_name=name, storage="sqlite:///results/own/studies.db").trials


def states(name: str = "search") -> list[str]:
    return [trial.state.name for trial in trials(name)]


# what is searched


def test_settings_are_ranges_choices_and_values(folder):
    settings = ["gamma=1..20:log", "finetune.epochs=10..40", "finetune.optimizer=sgd,adam", "seed=3"]
    fixed, searched = space_of(settings, Path("params.yaml"))
    assert fixed == ["seed=3"]
    assert searched == {
        "gamma": optuna.distributions.FloatDistribution(1, 20, log=True),
        "finetune.epochs": optuna.distributions.IntDistribution(10, 40),
        "finetune.optimizer": optuna.distributions.CategoricalDistribution(["sgd", "adam"]),
    }
    assert space_of(["benchmark.batch_sizes=[1,4]"], Path("params.yaml"))[1] == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gama=1..20", "gama"),
        ("gamma=-1..20", r"gamma.*-1"),
        ("gamma=20..1", r"gamma=20\.\.1: .*write a range as gamma=1\.\.20:log"),
        ("gamma=0..20:log", r"gamma=0\.\.20:log: .*write a range as"),
        ("finetune.optimizer=sgd,adamw", r"finetune\.optimizer.*adamw"),
        ("seed=much", r"seed.*much"),
    ],
)
def test_what_can_not_be_searched_is_named_before_anything_runs(folder, setting, message):
    with pytest.raises(UserError, match=message):
        space_of([setting], Path("params.yaml"))


def test_all_that_is_searched_by_default_is_allowed(start, experiments):
    output, status = start("--trials", "1")
    assert status == 0
    start("--trials", "1", "--study", "other", "--set", "gamma=5 finetune.epochs=3")
    settings, others = experiments.settings.values()
    assert len(settings) == module.SPACE.count("=")
    assert "study-search-0: gamma=" in output
    assert others[:2] == ["gamma=5", "finetune.epochs=3"]
    assert len(others) == len(settings) + 1  # a value that is given is not searched


# how trials end


@pytest.mark.parametrize("kind", ["blocks", "paths"])
def test_worth_of_a_trial_is_that_of_its_predictions(kind):
    split = make_split(20, size=16)
    pair = small_pair(classes=("dark", "grey", "light"), image_size=16)
    if kind == "paths":
        pair = replace(pair, **pair_between_paths(split.images))
    predictions = Predictor(pair)(split.images)
    accuracy, flops = worth_of(pair, split, torch.device("cpu"))
    assert flops == pytest.approx(np.mean([1 - p.flops_saved for p in predictions]))
    correct = [pair.classes.index(p.name) == y for p, y in zip(predictions, split.labels, strict=True)]
    assert accuracy == pytest.approx(np.mean(correct))


def test_front_is_of_accuracy_and_flops_on_validation_images(start, experiments):
    worth = {"0": (0.95, 0.6), "1": (0.90, 0.4), "2": (0.89, 0.5)}
    experiments.measures = lambda name: worth[name[-1]]
    output, status = start(*GAMMA, "--trials", "3")
    assert status == 0
    rows = re.findall(r"study-search-(\d) +\| (\S+) % +\| (\S+) % +\| gamma=", output)
    assert rows == [("1", "90.00", "40.00"), ("0", "95.00", "60.00")]  # 2 is worse than 1 in both
    assert "80.00" not in output  # the accuracy on test images


def test_budget_takes_the_best_of_those_that_keep_to_it(start, experiments):
    worth = {"0": (0.95, 0.6), "1": (0.90, 0.4), "2": (0.89, 0.5)}
    experiments.measures = lambda name: worth[name[-1]]
    output, _ = start(*GAMMA, "--trials", "1", "--budget", "0.5")
    assert "no trial is complete and within the budget yet" in output
    output, _ = start(*GAMMA, "--trials", "3", "--budget", "0.5")
    assert re.findall(r"study-search-(\d) +\|", output) == ["1"]


def test_hopeless_trial_is_pruned_at_its_first_bad_epoch(start, experiments):
    bad = "study-search-6"
    seen = []

    def epochs(name):
        for number in range(3):
            if name == bad:
                seen.append(number)
            yield (0.3 if name == bad else 0.9 + number / 100, 6.0)

    experiments.epochs = epochs
    output, _ = start(*GAMMA, "--trials", "8", "--budget", "0.5")
    assert states() == ["COMPLETE"] * 6 + ["PRUNED", "COMPLETE"]
    assert "pruned after epoch 1 of finetune" in output
    assert seen == [0]


def test_blocks_over_the_budget_count_against_a_trial(start, experiments):
    """15 of 15 blocks at a budget of half: half a point of accuracy does not outweigh that."""
    experiments.epochs = lambda name: [(0.95, 15.0)] if name.endswith("-6") else [(0.9, 6.0)]
    start(*GAMMA, "--trials", "7", "--budget", "0.5")
    assert states()[-1] == "PRUNED"


def test_curriculum_counts_at_its_end_alone(start, experiments, monkeypatch):
    def run(name, settings, log, on_epoch):
        on_epoch(epoch("curriculum", 1, 0.99, 14.0))
        on_epoch(epoch("curriculum", 3, 0.7, 9.0))
        on_epoch(epoch("finetune", 1, 0.8, 6.0))

    monkeypatch.setattr(module, "run_experiment", run)
    start(*GAMMA, "--trials", "1", "--budget", "0.5")
    assert trials()[0].intermediate_values == {0: pytest.approx(0.6), 1: pytest.approx(0.8)}


def test_failed_trial_keeps_its_error_and_the_next_one_runs(start, experiments):
    experiments.end = lambda name: TrialError("loss is NaN") if name.endswith("-0") else None
    output, status = start(*GAMMA, "--trials", "2")
    assert status == 0
    assert states() == ["FAIL", "COMPLETE"]
    assert trials()[0].user_attrs["error"] == "loss is NaN"
    assert "failed: loss is NaN" in output
    start(*GAMMA, "--trials", "2")  # it counts: nothing else runs
    assert len(trials()) == 2


# going on


def test_study_goes_on_where_it_ended(start, experiments):
    start(*GAMMA, "--trials", "2")
    start(*GAMMA, "--trials", "3")
    assert list(experiments.settings) == [f"study-search-{number}" for number in range(3)]
    assert len(set(experiments.gammas())) == 3  # the sampler does not repeat its first numbers


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_interrupted_trial_is_not_complete_and_its_parameters_run_first(start, experiments, how):
    error = KeyboardInterrupt() if how == "Ctrl-C" else None
    experiments.end = lambda name: error if name.endswith("-1") else None
    if how == "Ctrl-C":
        _, status = start(*GAMMA, "--trials", "4")
        assert status == 130
    else:
        start(*GAMMA, "--trials", "1")
        known = optuna.load_study(study_name="search", storage="sqlite:///results/own/studies.db")
        known.ask({"gamma": optuna.distributions.FloatDistribution(1, 20, log=True)})
        experiments.settings["study-search-1"] = [f"gamma={known.trials[1].params['gamma']}"]
    assert states() == ["COMPLETE", "FAIL" if how == "Ctrl-C" else "RUNNING"]
    start(*GAMMA, "--trials", "4")
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    gammas = experiments.gammas()
    assert gammas[1] == gammas[2]
    assert len(set(gammas)) == 4


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--set", "gamma=1..10:log"), "--set"),
        ((*GAMMA, "--set", "seed=1"), "--set"),
        ((*GAMMA, "--budget", "0.5"), "--budget"),
    ],
)
def test_other_settings_begin_another_study(start, experiments, words, named):
    start(*GAMMA, "--trials", "1")
    _, status = start(*words)
    assert f"was begun with another {named}" in str(status)
    assert "STUDY=other" in str(status)
    assert start(*words, "--trials", "1", "--study", "other")[1] == 0
    assert states("other") == ["COMPLETE"]


def test_other_parameters_begin_another_study_but_for_what_is_searched(start, folder):
    start(*GAMMA, "--trials", "1")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("gamma: 2.0\n", "gamma: 3.0\n", 1))
    assert start(*GAMMA, "--trials", "2")[1] == 0
    (folder / "params.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    assert "was begun with another params.yaml" in str(start(*GAMMA)[1])


# seeds


def test_seeds_are_pooled_and_a_failed_one_runs_again(start, experiments):
    worth = {"0": (0.90, 0.5), "2": (0.92, 0.6), "3": (0.94, 0.7)}
    experiments.measures = lambda name: worth[name[-1]]
    experiments.end = lambda name: TrialError("disk is full") if name.endswith("-1") else None
    output, _ = start("--seeds", "3", "--set", "gamma=5")
    assert list(experiments.settings.values()) == [["gamma=5", f"seed={seed}"] for seed in range(3)]
    assert "2 seeds" in output
    output, _ = start("--seeds", "3", "--set", "gamma=5")
    assert experiments.settings["study-seeds-3"] == ["gamma=5", "seed=1"]
    assert len(experiments.settings) == 4
    assert re.search(r"validation_accuracy \| 92\.00 \+- 2\.00 % +\| 90\.00 to 94\.00 %", output)
    assert re.search(r"test_flops +\| 55\.00 \+- 0\.00 %", output)


@pytest.mark.parametrize("setting", ["gamma=1..5", "seed=4"])
def test_seeds_take_one_value_of_each_parameter(start, setting):
    assert "with --seeds, --set takes one value" in str(start("--seeds", "2", "--set", setting)[1])


@pytest.mark.parametrize("name", ["-x", "a b", "../x"])
def test_name_of_a_study_is_one_of_experiments(start, name):
    assert "take letters, digits and -" in str(start(f"--study={name}")[1])


# an experiment as a process

DVC = """#!{python}
import signal, subprocess, sys, time
print("Running stage 'finetune':", flush=True)
for number in range(1, 4):
    print(f"finetune epoch {{number}}/3: accuracy 0.9, reward 0.1, blocks 6, unique_policies 4, "
          "active_blocks 15, 00:01 elapsed, 00:02 left", flush=True)
{rest}
"""


@pytest.fixture
def fake_dvc(folder, monkeypatch):
    """A `dvc` whose code after three epochs is given."""

    def make(rest: str) -> None:
        program = folder / "bin/dvc"
        program.parent.mkdir(exist_ok=True)
        program.write_text(DVC.format(python=sys.executable, rest=rest))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return make


SLOW_STAGE = """
stage = subprocess.Popen([sys.executable, "-c", '''
import signal, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("stopping after this step", flush=True)
'''])
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as DVC does
stage.wait()
sys.exit(1)
"""


def test_experiment_reports_its_epochs_and_fails_with_the_error_of_its_stage(folder, fake_dvc):
    fake_dvc('print("error: loss is NaN; lower the rate")\nprint("ERROR: failed to run")\nsys.exit(1)')
    seen = []
    log = folder / "results/own/studies/a.log"
    with pytest.raises(TrialError, match=r"^loss is NaN; lower the rate \(.*a\.log\)$"):
        run_experiment("a", ["gamma=5"], log, lambda line: seen.append(int(line["epoch"])))
    assert seen == [1, 2, 3]
    assert log.read_text().splitlines()[-1] == "ERROR: failed to run"
    fake_dvc("assert sys.argv[1:] == 'exp run --temp --name a -S gamma=5'.split(), sys.argv")
    run_experiment("a", ["gamma=5"], log, lambda line: None)


@pytest.mark.parametrize("how", ["pruned", "Ctrl-C"])
def test_ended_experiment_is_interrupted_and_waited_for(folder, fake_dvc, how):
    fake_dvc(SLOW_STAGE)
    log = folder / "a.log"

    def on_epoch(line) -> None:
        if how == "pruned" and line["epoch"] == "3":
            raise optuna.TrialPruned

    if how == "Ctrl-C":
        main = os.getpid()
        threading.Timer(3, lambda: os.kill(main, signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(optuna.TrialPruned if how == "pruned" else KeyboardInterrupt):
        run_experiment("a", [], log, on_epoch)
    assert time.monotonic() - begun < 40
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder / "bin/dvc") not in listed


def test_line_of_an_epoch_is_that_which_a_training_prints(folder, capsys):
    row = {"accuracy": 0.99494, "reward": -1e-5, "blocks_mean": 7.8939, "unique_policies": 15.0}
    row = {f"validation_{key}": value for key, value in (row | {"active_blocks": 15.0}).items()}
    with Progress("finetune", epochs=40, steps=1, history=[]) as progress:
        progress.lines = True
        progress.epoch_done({"epoch": 3.0} | row, 12.0)
    line = EPOCH.match(capsys.readouterr().out)
    assert line
    assert line.groupdict() == {
        "stage": "finetune", "epoch": "3", "epochs": "40",
        "accuracy": "0.9949", "blocks": "7.894", "all": "15",
    }  # fmt: skip
