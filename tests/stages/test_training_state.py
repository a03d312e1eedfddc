"""Trainings that are stopped, killed, damaged, repeated or run twice: nothing lost, nothing mixed up."""

import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from builders import enter_project
from repository_copy import ROOT, TINY, make_workplace

from pipeline.config import Params
from pipeline.inference import auto
from pipeline.inference.auto import Auto
from pipeline.inference.gather import Gather
from pipeline.inference.masked import Masked
from pipeline.infra.resume import ResumePoint
from pipeline.models.policies import collapse
from pipeline.models.policy_net import PolicyNet
from pipeline.policy.learner import PolicyLearner
from pipeline.training import classification, loop
from stages import curriculum, finetune, pretrain, prune, sole, static
from stages.support import inputs, training, training_state

# 48 training images: three steps an epoch
RECIPE = {"batch_size": 16, "epochs": 4}
SMALL = TINY | dict.fromkeys(("pretrain", "curriculum", "finetune"), RECIPE)
SMALL["prune"] = RECIPE | {"ratio": 0.5, "scope": "sensitivity"}
ITEMS = {
    "pretrain": pretrain.main,
    "prune": prune.main,
    "curriculum": curriculum.main,
    "finetune": finetune.main,
    "sole-8": lambda params: sole.main(params, depth=8),
    "static-random-3": lambda params: static.main(params, rule="random", num_kept=3),
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for top in ("models", "plots", "metrics")
        for path in sorted((folder / top).rglob("*"))
        if path.is_file() and "times" not in path.parts
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A workplace in which every training was run, without an interruption."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKDROP_DEVICE", "cpu")
        patch.setenv("DVC_ROOT", str(folder))
        patch.chdir(folder)
        params = make_workplace(folder, changes=SMALL)
        patch.setenv("BLOCKDROP_TRACKING", "off")
        for run in ITEMS.values():
            run(params)
    return folder


@pytest.fixture
def params(trained, tmp_path, monkeypatch) -> Params:
    """In a workplace with the same data and the pretrained networks, and no training behind it."""
    enter_project(tmp_path, monkeypatch)
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    made = make_workplace(tmp_path, changes=SMALL)
    for name in ("pretrain", "prune", "curriculum"):
        (tmp_path / "models" / name).mkdir(parents=True)
        for file in (trained / "models" / name).iterdir():
            (tmp_path / "models" / name / file.name).write_bytes(file.read_bytes())
    return made


def same_as(trained: Path, folder: Path, name: str) -> None:
    """Every file of that training is as in the uninterrupted one."""
    mine, theirs = files(folder), files(trained)
    own = {path for path in theirs if name.replace("-", "/", 1) in path.replace(".", "/")}
    assert own
    assert {path: mine[path] for path in own} == {path: theirs[path] for path in own}


def at_step(monkeypatch, number: int, action) -> list[int]:
    """Do `action` in the `number`-th step of whatever is trained, counted over all processes' work."""
    count: list[int] = []
    for kind in (classification.Classification, PolicyLearner):
        real = kind.step

        def step(self, batch, real=real):
            count.append(1)
            if len(count) == number:
                action()
            return real(self, batch)

        monkeypatch.setattr(kind, "step", step)
    return count


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def crash() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("name", "step", "place"),
    [
        ("pretrain", 2, "0 of 4, step 2 of 3"),
        ("prune", 4, "1 of 4, step 1 of 3"),
        ("curriculum", 5, "1 of 4, step 2 of 3"),
        ("finetune", 6, "1 of 4, step 3 of 3"),
        ("sole-8", 12, "3 of 4, step 3 of 3"),
        ("static-random-3", 1, "0 of 4, step 1 of 3"),
    ],
)
def test_ctrl_c_finishes_the_step_and_the_next_start_goes_on(
    name, step, place, params, trained, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        steps = at_step(patch, step, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            ITEMS[name](params)
        assert len(steps) == step  # the one that was running was finished, no other was begun
    assert not list(tmp_path.glob(f"plots/{name.replace('-', '/', 1)}.csv"))
    epoch, at = place.split(" of 4, step ")
    told = f"{name}: saved at epoch {int(epoch) + 1}, step {at[0]}; the same command goes on from there"
    assert told in capsys.readouterr().out
    with monkeypatch.context() as patch:
        steps = at_step(patch, 0, crash)
        ITEMS[name](params)
        assert len(steps) == 12 - step
    assert f"{name}: resuming after epoch {place}" in capsys.readouterr().out
    same_as(trained, tmp_path, name)


class Contest(Auto):
    """Two race, as on CUDA, and the test says who wins."""

    seconds: ClassVar[dict[str, float]] = {}

    def __init__(self, networks, *, precision="fp32"):
        super().__init__(networks, precision=precision)
        self.candidates = [Gather(networks), Masked(networks)]

    def _seconds(self, call, executor, failures):
        return self.seconds[executor.name]


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_what_won_a_race_before_an_interruption_runs_after_it(name, params, monkeypatch, capsys):
    """By the stopwatch another executor might win, which rounds otherwise: another training."""
    monkeypatch.setattr(auto, "Auto", Contest)
    monkeypatch.setattr(auto, "CHOICES", {})
    monkeypatch.setattr(Contest, "seconds", {"gather": 2.0, "masked": 1.0})
    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))  # in the second epoch: all have raced
        with pytest.raises(KeyboardInterrupt):
            ITEMS[name](params)
    before = dict(auto.CHOICES)
    assert set(before.values()) == {"masked"}
    monkeypatch.setattr(auto, "CHOICES", {})
    monkeypatch.setattr(Contest, "seconds", {})  # a race would raise KeyError
    with monkeypatch.context() as patch:
        at_step(patch, 2, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            ITEMS[name](params)
    assert before == auto.CHOICES
    assert "race again" not in capsys.readouterr().out
    monkeypatch.setattr(auto, "CHOICES", {})
    monkeypatch.setattr(Contest, "seconds", {"gather": 1.0, "masked": 2.0})
    monkeypatch.setattr(training_state, "describe_device", lambda _: "another GPU")
    ITEMS[name](params)
    assert set(auto.CHOICES.values()) == {"gather"}
    assert re.search(r"found out on CPU.*; on another GPU executors race again", capsys.readouterr().out)


def test_sigterm_does_the_same_and_leaves_with_143(params, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, send(signal.SIGTERM))
        with pytest.raises(SystemExit) as raised:
            finetune.main(params)
    assert raised.value.code == 143
    finetune.main(params)
    same_as(trained, tmp_path, "finetune")


def test_ctrl_c_while_the_result_is_written_leaves_it_whole(params, trained, tmp_path, monkeypatch):
    """Else DVC would go on with the next stage."""
    real = training.write_csv

    def write(*arguments, **options):
        send(signal.SIGINT)()
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_csv", write)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(params)
    same_as(trained, tmp_path, "finetune")
    with monkeypatch.context() as patch:
        steps = at_step(patch, 1, crash)
        finetune.main(params)
    assert not steps


def test_a_kill_loses_what_was_done_since_the_last_save(params, trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "SAVE_SECONDS", 0)
        patch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
        at_step(patch, 6, crash)  # in the sixth step; after the fifth there was a save
        with pytest.raises(RuntimeError, match="killed"):
            finetune.main(params)
    capsys.readouterr()
    finetune.main(params)
    assert "finetune: resuming after epoch 1 of 4, step 2 of 3" in capsys.readouterr().out
    same_as(trained, tmp_path, "finetune")


def test_within_its_seconds_only_the_end_of_an_epoch_is_saved(params, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
        at_step(patch, 6, crash)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain.main(params)
    capsys.readouterr()
    pretrain.main(params)
    assert "pretrain: resuming after epoch 1 of 4\n" in capsys.readouterr().out


def test_a_slow_disk_is_written_to_less_often(params, monkeypatch):
    saves = []
    real = ResumePoint.save
    monkeypatch.setattr(ResumePoint, "save", lambda self, state: saves.append(1) or real(self, state))
    monkeypatch.setattr(training_state, "MIN_TIMES_A_SAVE", 1e9)
    pretrain.main(params)
    assert len(saves) == 2  # the first one, which tells how slow it is, and the last


def test_after_a_damaged_state_the_one_before_it_is_used(params, trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
        at_step(patch, 9, crash)
        with pytest.raises(RuntimeError, match="killed"):
            finetune.main(params)
    (last,) = (p for p in (tmp_path / ".resume").glob("*.pt") if "previous" not in p.name)
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    finetune.main(params)
    said = capsys.readouterr().out
    assert f"{last} is damaged" in said
    assert "resuming after epoch 1 of 4\n" in said
    same_as(trained, tmp_path, "finetune")


def changed(params: Params, changes: dict) -> Params:
    values = params.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return Params.model_validate(values)


OTHERS = {
    "a learning rate": lambda patch: {"finetune_policy": {"lr": 0.5}},
    "the version of PyTorch": lambda patch: patch.setattr(torch, "__version__", "2.99"),
    "the code": lambda patch: patch.setattr(training, "digest_of_files", lambda paths: str(len(paths))),
    "the data": lambda patch: Path("data/prepared/dataset.json").write_text(
        Path("data/prepared/dataset.json").read_text().replace('"grey"', '"gray"')
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_no_training_goes_on_with_other(what, params, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            finetune.main(params)
    changes = OTHERS[what](monkeypatch)
    if isinstance(changes, dict):
        params = changed(params, changes)
    capsys.readouterr()
    at_step(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="killed"):
        finetune.main(params)
    assert "resuming" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "other", "same"),
    [
        (
            "pretrain",
            [{"pretrain": {"lr": 0.5}}, {"data": {"image_size": 16}}, {"seed": 9}],
            # data/prepared changes with data.test_fraction
            [{"data": {"test_fraction": 0.5}}, {"finetune": {"lr": 0.5}}, {"gamma": 7}],
        ),
        (
            "finetune",
            [{"gamma": 7}, {"finetune_policy": {"alpha": 0.7}}],
            [{"curriculum": {"gamma": 7}}],
        ),
        ("static", [], [{"finetune_policy": {"alpha": 0.7}}]),
        ("sole", [{"resnet": {"width": 8}}], [{"resnet": {"depth": 20}, "curriculum": {"epochs": 8}}]),
    ],
)
def test_a_parameter_changes_the_key_where_dvc_yaml_lists_it(stage, other, same, params):
    outputs = training.Outputs(stage, "")
    key = training._resume_key(outputs, params)
    for change in ({}, *same):
        assert training._resume_key(outputs, changed(params, change)) == key, change
    for change in other:
        assert training._resume_key(outputs, changed(params, change)) != key, change


def test_code_and_data_of_a_training_are_what_dvc_yaml_lists():
    code = {path.relative_to(ROOT).as_posix() for path in inputs.code_of("finetune")}
    native = "pipeline/inference/native.cpp"
    assert {"pipeline/policy/learner.py", native, "stages/finetune.py"} <= code
    assert "pipeline/report/markdown.py" not in code
    assert all((ROOT / path).is_file() for path in code)
    folders = [path.as_posix() for path in inputs.inputs_of("finetune")]
    assert folders == ["data/prepared", "models/prune", "models/curriculum"]


def test_global_generators_go_on_where_they_were(params, monkeypatch):
    """Nothing draws from them today; what will one day is resumed as exactly."""

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.random())]

    drawn = []
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: (torch.manual_seed(5), random.seed(5), np.random.seed(5), send(2)()))
        with pytest.raises(KeyboardInterrupt):
            finetune.main(params)
    expected = draw()
    torch.manual_seed(6)
    random.seed(6)
    np.random.seed(6)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: drawn.extend(draw()))
        finetune.main(params)
    assert drawn == expected


def test_a_result_is_taken_until_dvc_has_recorded_it(params, trained, tmp_path, monkeypatch, capsys):
    finetune.main(params)
    with monkeypatch.context() as patch:
        steps = at_step(patch, 1, crash)
        for path in ("models/finetune", "plots", "metrics"):  # DVC empties outs before a run
            for file in (tmp_path / path).rglob("*.*"):
                file.unlink()
        capsys.readouterr()
        finetune.main(params)
        assert not steps
    assert "another process has trained exactly this; its result is taken" in capsys.readouterr().out
    same_as(trained, tmp_path, "finetune")
    curve = (tmp_path / "plots/finetune.csv").read_bytes()
    out = {"path": "plots/finetune.csv", "md5": hashlib.md5(curve).hexdigest()}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"finetune": {"outs": [out]}}}))
    with monkeypatch.context() as patch:
        steps = at_step(patch, 0, crash)
        finetune.main(params)
        assert len(steps) == 12
    same_as(trained, tmp_path, "finetune")


def test_of_two_processes_with_the_same_work_one_trains(params, trained, tmp_path):
    code = (  # they begin together, and train slowly enough for the other one to come in between
        "import sys, time; from pathlib import Path; from pipeline.config import load; "
        "from pipeline.training.classification import Classification; from stages import sole; "
        "real = Classification.step; Classification.step = lambda *a: time.sleep(0.1) or real(*a); "
        "Path(f'ready-{sys.argv[1]}').touch()\n"
        "while len(list(Path().glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "sole.main(load(), depth=8)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", code, number], cwd=tmp_path, env=environment, **options)
        for number in "01"
    ]
    said = sorted((process.communicate(timeout=120)[0] for process in both), key=len)
    assert [process.returncode for process in both] == [0, 0], said
    assert "waiting: another process is at the same training" in said[0]
    assert "its result is taken" in said[0]
    assert "epoch 4/4" in said[1]
    same_as(trained, tmp_path, "sole-8")


def test_full_disk_is_said_once_and_training_goes_on(params, trained, tmp_path, monkeypatch, capsys):
    def fail(self, state):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(ResumePoint, "save", fail)
    monkeypatch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
    finetune.main(params)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert re.search(r"no resume point can be written \(.*: No space left.*; free some space", warning)
    same_as(trained, tmp_path, "finetune")


def test_unwritable_models_stop_it_before_any_training(params, tmp_path, monkeypatch):
    steps = at_step(monkeypatch, 1, crash)
    (tmp_path / "metrics").write_text("")
    with pytest.raises(OSError, match="metrics"):
        finetune.main(params)
    assert not steps


def test_divergence_names_step_and_remedy_and_keeps_the_state(params, monkeypatch, capsys):
    monkeypatch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
    with monkeypatch.context() as patch:
        real = classification.Classification.step
        count: list[int] = []

        def spoiled(self, batch):
            count.append(1)
            metrics = real(self, batch)
            return metrics | {"loss": metrics["loss"] * float("nan")} if len(count) == 5 else metrics

        patch.setattr(classification.Classification, "step", spoiled)
        with pytest.raises(training_state.TrainingError) as raised:
            sole.main(params, depth=8)
    assert len(count) == 6  # it was seen at the end of the epoch
    said = str(raised.value)
    assert "sole-8 diverged: loss is not finite from step 2 of epoch 2 on" in said
    assert "lower the learning rate of pretrain in params.yaml" in said
    capsys.readouterr()
    sole.main(params, depth=8)
    assert "resuming after epoch 1 of 4\n" in capsys.readouterr().out


def test_divergence_is_seen_before_a_state_in_an_epoch_is_saved(params, monkeypatch):
    monkeypatch.setattr(training_state, "MIN_TIMES_A_SAVE", 0)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0)
    learner: list[classification.Classification] = []
    real = classification.Classification.begin_epoch

    def begin_epoch(self, epoch: int) -> None:
        learner.append(self)
        real(self, epoch)

    def spoil() -> None:
        learner[0].resnet.fc.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(classification.Classification, "begin_epoch", begin_epoch)
    steps = at_step(monkeypatch, 5, spoil)
    with pytest.raises(training_state.TrainingError, match=r"sole-8 diverged: .* step 2 of epoch 2"):
        sole.main(params, depth=8)
    assert len(steps) == 5


@pytest.mark.parametrize(
    ("keep_ratio", "entropy", "words"),
    [
        (1.0, 0.5, "keeps every block of every image; lower gamma"),
        (0.0, 0.5, "drops every block of every image; raise gamma"),
        (0.5, 0.001, "no longer explores .* raise entropy_coef"),
        (0.0, None, "drops every block"),
        (0.999, 0.02, None),
        (0.001, 0.6, None),
    ],
)
def test_collapsed_policies_are_told_apart_with_a_remedy(keep_ratio, entropy, words):
    found = collapse(keep_ratio=keep_ratio, entropy=entropy)
    assert found is None if words is None else re.search(words, found)


def checkpointer_of(run: Mock, params: Params, **objective) -> training_state.Checkpointer:
    learner = SimpleNamespace(
        modules={"policy_net": PolicyNet(num_blocks=6, width=4)}, objective=SimpleNamespace(**objective)
    )
    state = training_state.TrainingState()
    point = ResumePoint(path=Path("a.pt"))
    return training_state.Checkpointer("finetune", params.finetune, learner, point, state, run)


def epoch_result(epoch: int, **validation: float) -> loop.EpochResult:
    return loop.EpochResult(epoch=epoch, train={"loss": 1.0}, validation={"accuracy": 0.5, **validation})


@pytest.mark.parametrize(
    ("active", "kept", "warns"), [(6.0, 6.0, True), (5.0, 6.0, False), (6.0, 5.9, False)]
)
def test_collapse_is_said_once_and_tagged_when_all_is_learnt(active, kept, warns, params, capsys):
    run = Mock(run_id="")
    checkpointer = checkpointer_of(run, params, entropy_epochs=None)
    for epoch in range(3):
        result = epoch_result(epoch, blocks_mean=kept, policy_entropy=0.3, active_blocks=active)
        checkpointer.epoch_done(result)
    warnings = capsys.readouterr().err
    assert warnings.count("collapsed") == int(warns)
    if warns:
        assert "finetune: the policy has collapsed by the end of epoch 1: it keeps every" in warnings
        ((name, value), _) = run.set_tag.call_args
        assert name == "blockdrop.warning"
        assert "lower gamma" in value


@pytest.mark.parametrize(("entropy_epochs", "warns"), [(None, True), (4, False)])
def test_a_policy_that_is_to_settle_may(entropy_epochs, warns, params, capsys):
    checkpointer = checkpointer_of(Mock(run_id=""), params, entropy_epochs=entropy_epochs)
    checkpointer.epoch_done(epoch_result(0, blocks_mean=3.0, policy_entropy=0.001, active_blocks=6.0))
    assert ("no longer explores" in capsys.readouterr().err) == warns


def test_interrupted_training_goes_on_in_the_same_run(params, trained, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("BLOCKDROP_TRACKING")
    with monkeypatch.context() as patch:
        at_step(patch, 8, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            finetune.main(params)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "blockdrop")
    wanted = "tags.`blockdrop.stage` = 'finetune'"
    (run,) = client.search_runs([experiment.experiment_id], filter_string=wanted)
    assert run.info.status == "KILLED"
    finetune.main(params)
    (again,) = client.search_runs([experiment.experiment_id], filter_string=wanted)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [point.step for point in history] == [1, 2, 3, 4]
    same_as(trained, tmp_path, "finetune")
