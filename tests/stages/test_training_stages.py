"""Trainings as stages: what they write, how they go on, what they show on a terminal and in a log."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from builders import small_pair
from repository_copy import ROOT, TINY, make_workplace

from pipeline.config import Params
from pipeline.data.split import Split
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet
from stages import curriculum, finetune, pretrain, sole, static
from stages.support import recipes, training
from stages.support.common import read_csv
from stages.support.progress import Progress, Steps

SMALL = TINY | {"pretrain": {"epochs": 4, "batch_size": 16}, "finetune": {"epochs": 4, "batch_size": 16}}


@pytest.fixture
def params(tmp_path, monkeypatch) -> Params:
    """In a workplace of its own, which is left as the current folder."""
    made = make_workplace(tmp_path, changes=SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    monkeypatch.delenv("CI", raising=False)
    return made


def files(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for top in ("models", "plots")
        for path in sorted((folder / top).rglob("*"))
        if path.is_file()
    }


def pretrained(folder, params: Params) -> None:
    torch.manual_seed(0)
    made = checkpoint.Checkpoint(
        stage="pretrain",
        resnet=cifar_resnet(depth=params.resnet.depth, width=params.resnet.width, num_classes=3),
        policy_net=None,
        normalisation=recipes.normalisation_of(params),
        image_size=8,
        classes=("dark", "grey", "light"),
        metrics={},
    )
    for stage in ("pretrain", "prune"):  # nothing is pruned
        checkpoint.save(made, folder / "models" / stage)


@pytest.mark.parametrize(
    ("precision", "instructions"), [("bf16", True), ("bf16", False), ("fp32", False)]
)
def test_training_in_emulated_bf16_says_what_it_costs(
    precision, instructions, params, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(training, "computes_in_bf16", lambda device: instructions)
    section = params.pretrain.model_copy(update={"precision": precision, "epochs": 1})
    sole.main(params.model_copy(update={"pretrain": section}), depth=8)
    assert (tmp_path / "models/sole/8/model.json").exists()
    said = [line for line in capfd.readouterr().err.splitlines() if "pretrain.precision" in line]
    assert len(said) == (precision == "bf16" and not instructions)
    for line in said:
        assert line.startswith("warning: pretrain.precision is bf16, for which this CPU has no")
        assert line.endswith("set pretrain.precision to fp32")


def test_an_item_of_a_matrix_writes_under_its_name(params, tmp_path):
    sole.main(params, depth=8)
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written >= {
        "models/sole/8/model.json",
        "models/sole/8/model.safetensors",
        "plots/sole/8.csv",
        "metrics/times/sole-8.json",
    }
    assert not list((tmp_path / "metrics").glob("*.json"))
    made = checkpoint.load(tmp_path / "models/sole/8")
    assert made.need_resnet().depth == 8
    assert made.image_size == params.data.image_size
    assert made.normalisation == recipes.normalisation_of(params)
    assert set(made.metrics) == {"accuracy", "loss"}


def test_a_static_finetuning_moves_only_what_runs(params, tmp_path):
    pretrained(tmp_path, params)
    before = checkpoint.load(tmp_path / "models/pretrain").need_resnet()
    static.main(params, rule="first", num_kept=3)
    after = checkpoint.load(tmp_path / "models/static/first-3").need_resnet()
    for index, pair in enumerate(zip(before.flat_blocks(), after.flat_blocks(), strict=True)):
        same = torch.equal(pair[0].conv1.weight, pair[1].conv1.weight)
        assert same == (index >= 3)
    assert (tmp_path / "plots/static/first-3.csv").read_text().count("\n") == 5
    assert (tmp_path / "metrics/times/static-first-3.json").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: sole.main(p, depth=20), r"sole.depths \[8\] does not name 20"),
        (lambda p: static.main(p, rule="last", num_kept=3), "does not name last with 3"),
        (lambda p: static.main(p, rule="first", num_kept=4), "does not name first with 4"),
    ],
)
def test_what_params_yaml_does_not_name_is_refused(params, call, words):
    with pytest.raises(UserError, match=words):
        call(params)


def test_items_do_not_take_up_each_others_trainings(params):
    keys = {
        training._resume_key(training.Outputs("static", item), params)
        for item in ("first-3", "random-3", "first-4")
    }
    assert len(keys) == 3


ROW = {"epoch": 1, "validation_accuracy": 0.9912, "validation_blocks_mean": 7.25,
       "validation_reward": 0.5, "validation_unique_policies": 3.0}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty one, which is left as the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_curve_so_far_is_where_the_stage_writes_the_whole_one(workplace):
    for outputs in (training.Outputs("policy_pretrain", ""), training.Outputs("static", "random-3")):
        with Progress(outputs.name, epochs=3, steps=1, history=[]) as progress:
            assert not outputs.curve.exists()
            for epoch in (1, 2):
                progress.epoch_done(ROW | {"epoch": epoch}, 1.0)
                assert [row["epoch"] for row in read_csv(outputs.curve)] == ["1", "2"][:epoch]
        assert outputs.curve.exists()


def test_resumed_training_shows_its_earlier_epochs_at_once(workplace):
    history = [ROW, ROW | {"epoch": 2}]
    with Progress("finetune", epochs=4, steps=3, history=history, step=1):
        assert [row["epoch"] for row in read_csv(Path("plots/finetune.csv"))] == ["1", "2"]


@pytest.mark.parametrize(("epochs", "stays"), [(0, True), (1, False), (3, False), (4, True)])
def test_stopped_training_leaves_no_part_of_a_curve(workplace, epochs, stays):
    """But a whole one, and what an earlier training left, where it has written nothing itself."""
    curve = workplace / "plots/finetune.csv"
    curve.parent.mkdir()
    curve.write_text("of an earlier training")

    def train() -> None:
        with Progress("finetune", epochs=4, steps=3, history=[]) as progress:
            for _ in range(epochs):
                progress.epoch_done(ROW, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert curve.exists() == stays


def test_training_goes_on_where_its_curve_cannot_be_shown(workplace):
    (workplace / "plots").touch()  # in the place of the folder
    with Progress("finetune", epochs=4, steps=3, history=[ROW]) as progress:
        progress.epoch_done(ROW | {"epoch": 2}, 1.0)


def test_without_a_terminal_there_is_a_line_an_epoch_and_no_bar(workplace, capsys):
    with Progress("finetune", epochs=40, steps=3, history=[]) as progress:
        for _ in range(3):
            progress.step()
        progress.epoch_done(ROW, 2.0)
        progress.epoch_done(ROW | {"epoch": 2}, 90.0)
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (
        "finetune epoch 1/40: accuracy 0.9912, reward 0.5, blocks 7.25, unique_policies 3, "
        "00:02 elapsed, 01:18 left\n"
        "finetune epoch 2/40: accuracy 0.9912, reward 0.5, blocks 7.25, unique_policies 3, "
        "01:30 elapsed, 28:30 left\n"
    )


class Terminal(io.StringIO):
    """Keeps what is written to a terminal of some width."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.ends = pty.openpty()
        resize(self.ends[1], columns)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.ends[1]


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@pytest.fixture
def terminal(monkeypatch) -> Iterator[Terminal]:
    monkeypatch.delenv("CI", raising=False)
    made = Terminal(columns=100)
    yield made
    for end in made.ends:
        os.close(end)


def test_a_resumed_bar_starts_where_the_training_is(workplace, terminal):
    with redirect_stderr(terminal), Progress("pretrain", epochs=4, steps=3, history=[ROW] * 2) as bar:
        assert "50%" in terminal.getvalue()
        assert "6/12" in terminal.getvalue()
        assert "accuracy 0.9912" in terminal.getvalue()
        for _ in range(3):
            bar.step()
        bar.epoch_done(ROW | {"epoch": 3, "validation_accuracy": 0.9999}, 9.0)
    last = terminal.getvalue().split("\r")[-1]
    assert "75%" in last
    assert "9/12" in last
    assert "accuracy 0.9999, blocks 7.25, reward 0.5" in last


@pytest.mark.parametrize(
    ("columns", "ci", "bar"), [(100, False, True), (0, False, False), (100, True, False)]
)
def test_lines_go_to_a_log_and_a_bar_to_a_terminal_with_a_width(
    workplace, terminal, monkeypatch, capsys, columns, ci, bar
):
    if ci:
        monkeypatch.setenv("CI", "true")
    resize(terminal.fileno(), columns)
    with redirect_stderr(terminal), Progress("pretrain", epochs=4, steps=3, history=[]) as progress:
        progress.step()
        progress.epoch_done(ROW, 9.0)
    assert bool(terminal.getvalue()) == bar
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pretrain epoch 1/4: accuracy 0.9912")


def test_a_stage_that_trains_nothing_has_a_bar_of_what_it_has_done(terminal):
    images = Split(images=torch.zeros(10, 8, 8, 3).byte(), labels=torch.zeros(10).long())
    with redirect_stderr(terminal), Steps("evaluate") as steps:
        steps.total(40)
        assert [len(part) for part in steps.over(images, 2).iter_batches(5)] == [5, 5]
        assert steps.over(images).image_size == 8
        assert steps.bar.n == 20
        steps.reach(30)
        assert steps.bar.n == 30
        steps.reach(99)
        assert steps.bar.n == 40
    assert "100%" in terminal.getvalue()


def test_without_a_terminal_such_a_stage_says_its_lines_alone(capsys):
    with Steps("benchmark", 60.0) as steps:
        steps.reach(30.0)
        steps.say("benchmark: batch 1")
    assert capsys.readouterr() == ("benchmark: batch 1\n", "")


def on_a_terminal(command: list[str], folder, *, columns: int) -> str:
    """What a command shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    resize(theirs, columns)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # Linux's end of file, when the other side is closed
            break
    os.close(ours)
    assert child.wait() == 0, shown.decode()
    return shown.decode()


def test_on_a_terminal_there_is_one_bar_for_the_whole_training(params, tmp_path):
    shown = on_a_terminal([sys.executable, "-m", "stages.sole", "8"], tmp_path, columns=80)
    first, bar, rest = shown.split("\r\n")  # a terminal's line end; the bar goes back by \r alone
    assert first.startswith("sole-8: 4 epochs on CPU")
    assert rest == ""
    states = [state for state in bar.split("\r") if state.strip()]
    assert all(len(state) <= 80 for state in states)
    assert all(state.startswith("sole-8 ") for state in states)
    # 4 epochs of 48 images in batches of 16
    done = [int(re.search(r"(\d+)/12, ", state)[1]) for state in states]
    assert done == sorted(done)
    assert "100%" in states[-1]
    assert re.search(r"00:00 left, accuracy \d", states[-1])
    assert "epoch 1" not in shown


def test_in_a_pipe_there_are_lines_alone(params, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stages.sole", "8"], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.search(r": accuracy \S+, \d\d:\d\d elapsed, \d\d:\d\d left$", x) for x in lines[1:])


OTHERS = {  # than the paper's
    "curriculum": {"estimator": "local_expectation", "num_flips": 2, "soft_reward": True, "epochs": 4},
    "finetune": SMALL["finetune"] | {"optimizer": "sgd", "distillation": 0.5},
    "finetune_policy": {
        "estimator": "reinmax", "entropy_schedule": "linear", "marginal_entropy_coef": 0.1,
        "frozen_epochs": 1, "train_epochs": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("train_epochs", "entropy_epochs"), [(2, 2), (None, 3)])
def test_the_entropy_falls_while_the_policy_learns(params, train_epochs, entropy_epochs):
    pace = {"frozen_epochs": 1, "train_epochs": train_epochs, "entropy_schedule": "linear"}
    section = params.finetune_policy.model_copy(update=pace)
    both = small_pair(classes=("a", "b"), image_size=8)
    learner = finetune.learner_of(
        params.model_copy(update={"finetune_policy": section}),
        both.need_resnet(), both.need_policy_net(), both.normalisation,
    )  # fmt: skip
    assert learner.objective.entropy_epochs == entropy_epochs


def test_recipes_of_params_reach_the_learners_and_train(params, tmp_path, monkeypatch):
    params = make_workplace(tmp_path / "other", changes=SMALL | OTHERS)
    params = params.model_copy(update={"block_cost": "flops"})
    monkeypatch.chdir(tmp_path / "other")
    pretrained(tmp_path / "other", params)
    learners = {}
    train = training._train

    def spy(outputs, params, section, learner, networks):
        learners[outputs.stage] = learner
        train(outputs, params, section, learner, networks)

    monkeypatch.setattr(training, "_train", spy)
    curriculum.main(params)
    finetune.main(params)
    static.main(params, rule="random", num_kept=params.static.num_kept[0])
    assert checkpoint.load(Path("models/finetune")).usual_images is not None
    first, second = learners["curriculum"].objective, learners["finetune"].objective
    assert (first.estimator, first.num_flips, first.soft_reward) == ("local_expectation", 2, True)
    assert sum(first.block_shares) == pytest.approx(1)
    assert len(set(first.block_shares)) > 1
    assert first.entropy_epochs is first.train_epochs is None
    assert first.frozen_epochs == 0
    assert (second.estimator, second.marginal_entropy_coef) == ("reinmax", 0.1)
    assert (second.frozen_epochs, second.entropy_epochs, second.train_epochs) == (1, 2, 2)
    assert second.block_shares == first.block_shares
    adam, sgd = learners["finetune"].optimizer.parts
    assert [type(part).__name__ for part in (adam, sgd)] == ["AdamW", "SGD"]
    assert type(learners["static"].optimizer).__name__ == "SGD"
    trained_resnet, _ = learners["finetune"].joint
    for learner in (trained_resnet, learners["static"]):
        assert learner.distillation.teacher_weight == 0.5
        assert learner.distillation.teacher is not None


def importing(params: Params, **paths: str) -> Params:
    """The parameters with these checkpoints to take instead of training."""
    checkpoints = params.checkpoints.model_copy(update=paths)
    return params.model_copy(update={"checkpoints": checkpoints})


def test_checkpoints_of_matrix_stages_are_taken_from_their_folders(params, tmp_path):
    pretrained(tmp_path, params)
    rule, num_kept = params.static.rules[0], params.static.num_kept[0]
    sole.main(params, depth=8)
    static.main(params, rule=rule, num_kept=num_kept)
    trained = files(tmp_path)
    for name in ("sole", "static"):
        (tmp_path / "models" / name).rename(tmp_path / name)
    params = importing(params, sole="sole", static="static")
    sole.main(params, depth=8)
    static.main(params, rule=rule, num_kept=num_kept)
    imported = files(tmp_path)
    for item in ("sole/8", f"static/{rule}-{num_kept}"):
        path = f"models/{item}/model.safetensors"
        assert imported[path] == trained[path]
        assert imported[f"plots/{item}.csv"] == b"epoch,train_accuracy,validation_accuracy\r\n"
        times = (tmp_path / "metrics/times" / f"{item.replace('/', '-')}.json").read_text()
        assert '"seconds": null' in times


def test_checkpoint_of_another_depth_in_the_folder_is_refused(params, tmp_path):
    pretrained(tmp_path, params)
    (tmp_path / "models/pretrain").rename(tmp_path / "8")  # it has a depth of 14
    with pytest.raises(UserError, match=r"^8: its family, depth, .* is \(.*14.*, expected \(.*8"):
        sole.main(importing(params, sole="."), depth=8)
    assert not (tmp_path / "models/sole").exists()


def test_a_warm_up_precedes_every_schedule(params):
    def factors(schedule):
        section = params.pretrain.model_copy(update={"schedule": schedule, "warmup_fraction": 0.2})
        return [recipes.schedule_of(section)(progress) for progress in (0.0, 0.1, 0.2, 0.6, 0.9)]

    assert factors("constant") == pytest.approx([0, 0.5, 1, 1, 1])
    assert factors("step") == pytest.approx([0, 0.5, 1, 1, 0.1])
    assert factors("cosine") == pytest.approx([0, 0.5, 1, 0.5, 0.0380602337])


def saved_pair(params: Params, **changes) -> None:
    """A finetuned pair as params.yaml describes it, but for the changes, in import/pair."""
    describes = params.policy_net.model_dump(exclude={"paths"}) | changes
    image_size = describes.pop("image_size", params.data.image_size)
    resnet = cifar_resnet(depth=params.resnet.depth, width=params.resnet.width, num_classes=3)
    pair = checkpoint.Checkpoint(
        stage="finetune",
        resnet=resnet,
        policy_net=PolicyNet(num_blocks=resnet.num_blocks, **describes),
        normalisation=recipes.normalisation_of(params),
        image_size=image_size,
        classes=("dark", "grey", "light"),
        metrics={},
    )
    checkpoint.save(pair, Path("import/pair"))


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (finetune, {}, None),
        (curriculum, {"input_size": 8}, None),  # the images' own
        (curriculum, {"width": 12}, "policy network's family, depth, width and input_size is"),
        (finetune, {"depth": 14}, "set policy_net in params.yaml to the checkpoint's"),
        (curriculum, {"image_size": 12}, "its image size is 12, expected 8; set data.image_size"),
        (pretrain, {"image_size": 12}, "its image size is 12, expected 8; set data.image_size"),
        (pretrain, {"width": 12}, None),  # it takes the ResNet alone
    ],
)
def test_an_import_that_params_do_not_describe_is_refused(params, stage, change, message):
    pretrained(Path(), params)
    saved_pair(params, **change)
    name = stage.__name__.removeprefix("stages.")
    params = importing(params, **{name: "import/pair"})
    if message is None:
        stage.main(params)
        return
    with pytest.raises(UserError, match=message):
        stage.main(params)
    assert not Path("models", name, "model.safetensors").exists() or name == "pretrain"
