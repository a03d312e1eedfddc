"""The chaos harness: each of its checks can fail, its faults hit what they should, and it runs."""

import csv
import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from chaos import __main__ as chaos
from chaos import cases as chaos_cases
from chaos import checks
from chaos import home as chaos_home
from chaos.cases import Outcome, draw_fault, draw_kill, said_once, unclear
from chaos.home import Home, Recovery, Training, compile_shim, preloaded
from repository_copy import ROOT, environment

from tools.sandbox import digests

ENTRY = {"cmd": "train", "deps": [], "outs": [{"path": "models/pretrain", "md5": "1"}]}
CLOCKED = {"path": "metrics/times/pretrain.json", "md5": "2"}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with outs, a lock, a store and a cached object, all as they should be."""
    folder = tmp_path / "copy"
    for name in ("models/pretrain/model.json", "metrics/pretrain.json", "metrics/times/pretrain.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "dvc.lock").write_text(
        yaml.safe_dump({"stages": {"pretrain": ENTRY | {"outs": [*ENTRY["outs"], CLOCKED]}}})
    )
    (folder / ".dvc/tmp").mkdir(parents=True)
    (folder / ".dvc/tmp/lock").write_text("1")
    (folder / ".dvc/tmp/rwlock").write_text('{"write": {}}')
    (folder / ".dvc/tmp/half.tmp").touch()  # DVC's, not ours
    (folder / ".resume").mkdir()
    (folder / ".resume/pretrain-abc.lock").touch()
    (folder / ".resume/pretrain-abc.finished.pt").touch()
    cached = folder / ".dvc/cache/files/md5/99"
    cached.mkdir(parents=True)
    (cached / "914b932bd37a50b983c5e7c90ae93b").write_text("{}")
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        store.execute("create table runs (run_uuid, name, status, lifecycle_stage)")
        store.execute("insert into runs values ('1', 'pretrain', 'FINISHED', 'active')")
        store.execute("insert into runs values ('2', 'gone', 'RUNNING', 'deleted')")
    return folder


def fake_dvc(folder: Path, script: str) -> dict[str, str]:
    """Variables with which `dvc` is this shell script."""
    (folder / "bin").mkdir()
    program = folder / "bin/dvc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def found(checkout: Path, truth: dict[str, str], *, script: str = "exit 0") -> list[str]:
    return checks.losses(
        checkout,
        outs=truth,
        entries={"pretrain": ENTRY},
        store=checkout / "mlflow.db",
        environment=fake_dvc(checkout.parent, script),
    )


def test_checkout_as_it_should_be_has_lost_nothing(checkout):
    truth = digests(checkout)
    (checkout / "metrics/times/pretrain.json").write_text('{"seconds": 1}')  # the clock's
    assert found(checkout, truth) == []


def spoil_store(checkout: Path) -> None:
    with closing(sqlite3.connect(checkout / "mlflow.db")) as store, store:
        store.execute("insert into runs values ('3', 'finetune', 'RUNNING', 'active')")


def write(name: str, text: str):
    def spoil(checkout: Path) -> None:
        (checkout / name).write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (write("metrics/pretrain.json", "{"), "metrics/pretrain.json differs"),
        (lambda c: (c / "models/pretrain/model.json").unlink(), "models/pretrain/model.json is missing"),
        (write("models/pretrain/more", ""), "models/pretrain/more is new"),
        (write("dvc.lock", yaml.safe_dump({"stages": {}})), "dvc.lock on pretrain differs"),
        (write("dvc.lock", "stages: {"), "dvc.lock can't be read"),
        (write("dvc.lock", "stages:\n  pretrain:\n    outs:\n"), "dvc.lock can't be read"),
        (lambda c: (c / "dvc.lock").unlink(), "dvc.lock on pretrain differs"),
        (write(".dvc/cache/files/md5/99/914b932bd37a50b983c5e7c90ae93b", "{"), "is damaged"),
        (write("metrics/.pretrain.json.tmp", ""), "metrics/.pretrain.json.tmp is left over"),
        (write(".resume/pretrain-abc.fresh.pt", ""), "pretrain-abc.fresh.pt is left over"),
        (write(".dvc/tmp/rwlock", ""), ".dvc/tmp/rwlock is no JSON"),
        (spoil_store, "run finetune (3) is left RUNNING"),
    ],
)
def test_each_loss_is_seen(checkout, spoil, said):
    truth = digests(checkout)
    spoil(checkout)
    lost = found(checkout, truth)
    assert len(lost) == 1 + (said == "metrics/.pretrain.json.tmp is left over")  # it is a new file too
    assert any(said in line for line in lost), lost


@pytest.mark.parametrize("name", [".resume/pretrain-abc.lock", ".dvc/tmp/lock"])
def test_lock_that_is_held_is_seen(checkout, name):
    truth = digests(checkout)
    with (checkout / name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lost = found(checkout, truth)
    assert lost == [f"{name} is held"]


@pytest.mark.parametrize("alive", [True, False])
def test_entry_in_dvcs_list_of_locks_counts_while_its_process_lives(checkout, alive):
    ended = subprocess.Popen(["true"])
    ended.wait()
    row = f'{{"pid": {os.getpid() if alive else ended.pid}, "cmd": "dvc repro"}}'
    (checkout / ".dvc/tmp/rwlock").write_text(f'{{"write": {{"a": {row}}}, "read": {{"b": [{row}]}}}}')
    assert len(checks.held_locks(checkout)) == int(alive)


def test_process_that_is_left_is_seen_and_ended(checkout):
    with subprocess.Popen(["sleep", "60"], cwd=checkout) as left:
        (said,) = checks.left_processes(checkout, patience=0)
        assert "sleep 60" in said
        assert left.wait(5) == -signal.SIGKILL
    assert checks.left_processes(checkout, patience=0) == []


def test_process_that_ends_in_time_is_no_loss(checkout):
    with subprocess.Popen(["sleep", "0.3"], cwd=checkout):
        assert checks.left_processes(checkout, patience=5) == []


def test_status_that_is_not_clean_is_seen(checkout):
    (lost,) = found(checkout, digests(checkout), script="echo pretrain changed; exit 1")
    assert lost == "dvc status is not clean: pretrain changed"


def test_status_that_takes_an_interrupted_stage_for_a_finished_one_is_seen(checkout):
    truth = digests(checkout)
    clean = fake_dvc(checkout.parent, "exit 0")
    assert checks.premature(checkout, "pretrain", truth, clean) == []
    (checkout / "models/pretrain/model.json").unlink()
    (lost,) = checks.premature(checkout, "pretrain", truth, clean)
    assert "models/pretrain/model.json is missing" in lost
    assert checks.premature(checkout, "finetune", truth, clean) == []  # DVC says that it has not run


# after a fault: one plain `dvc repro`


@pytest.fixture
def home(checkout) -> Home:
    """A home whose trainings are made up, and the checkout a copy in it."""
    names = ("pretrain", "curriculum", "finetune", "sole@8", "static@first-3")
    trainings = [
        Training(
            name=name,
            command=f"python -m stages.{name}",
            seconds={"start": 2.0, "training": 2.0, "end": 1.0},
            writes={".resume": 60, "models": 8, "plots": 9, "metrics": 14, "mlflow.db": 50},
        )
        for name in names
    ]
    return Home(
        folder=checkout.parent,
        trainings=trainings,
        outs=digests(checkout),
        entries={"pretrain": ENTRY},
        library=Path("faults.so"),
        dvc_writes={"dvc.lock": 50, ".dvc/cache": 300, ".dvc/tmp": 200},
        deadline=time.monotonic() + 60,
    )


def recover(home: Home, checkout: Path, monkeypatch, script: str) -> Recovery:
    variables = fake_dvc(
        checkout.parent, f'[ "$1" = status ] && exec test -e models/pretrain/model.json\n{script}'
    )
    monkeypatch.setattr(chaos_home, "environment", lambda _: variables)
    monkeypatch.setenv("PATH", variables["PATH"])  # where Popen looks
    return chaos_home.recover(home, checkout, home.trainings[0])


def test_plain_repro_that_brings_everything_back_has_lost_nothing(home, checkout, monkeypatch):
    (checkout / "models/pretrain/model.json").unlink()
    script = "echo '{}' | tr -d '\\n' > models/pretrain/model.json"
    assert recover(home, checkout, monkeypatch, script) == Recovery()


def test_plain_repro_that_fails_is_a_loss(home, checkout, monkeypatch):
    lost = recover(home, checkout, monkeypatch, "echo broken; exit 3").losses
    assert lost == ["dvc repro: exit status 3: broken\n"]


@pytest.mark.parametrize(
    ("state", "said", "resumed", "is_lost"),
    [
        ("", "pretrain: resuming after epoch 3 of 8", True, False),
        ("", "pretrain: another process has trained exactly this; its result is taken", True, False),
        ("", "pretrain epoch 1/8: accuracy 0.5", False, True),
        (".fresh", "pretrain epoch 1/8: accuracy 0.5", False, False),  # half of one
    ],
)
def test_training_that_starts_over_beside_its_resume_point_is_a_loss(
    home, checkout, monkeypatch, state, said, resumed, is_lost
):
    (checkout / ".resume/pretrain-abc.finished.pt").unlink()
    (checkout / f".resume/pretrain-abc{state}.pt").touch()
    script = f"echo \"Running stage 'pretrain':\"; echo '{said}'; rm .resume/*.pt"
    found = recover(home, checkout, monkeypatch, script)
    assert found.resumed == resumed
    assert any("started over" in line for line in found.losses) == is_lost
    assert len(found.losses) == int(is_lost)


def test_repro_that_hangs_is_a_loss_and_is_ended(home, checkout, monkeypatch):
    monkeypatch.setattr(chaos_home, "PATIENCE", 0.3)
    lost = recover(home, checkout, monkeypatch, "sleep 60").losses
    assert any("did not end" in line for line in lost)
    assert checks.processes_in(checkout) == []


def test_file_that_dvc_left_torn_is_mended_and_named(home, checkout, monkeypatch):
    (checkout / ".dvc/tmp/rwlock").write_text("")
    words = "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted"
    script = f'test -e .dvc/tmp/rwlock || exit 0; echo "ERROR: {words}"; exit 255'
    assert recover(home, checkout, monkeypatch, script) == Recovery(torn=[".dvc/tmp/rwlock"])


# what a stage says


@pytest.mark.parametrize(
    ("said", "status", "is_clear"),
    [
        ("error: models/pretrain/model.json: No space left; free some space, and repeat", 1, True),
        ("error: No space left; free some space, and repeat", 1, False),
        ("error: models/pretrain/model.json: No space left", 1, False),
        ("error: models/a: b; c\nerror: models/a: b; c", 1, False),
        ("Traceback (most recent call last)\nerror: models/a: No space left; free some", 1, False),
        ("ERROR: failed to reproduce 'pretrain'", 1, False),
        ("pretrain epoch 8/8", 0, True),
    ],
)
def test_words_of_a_stage_whose_write_failed(said, status, is_clear):
    assert (unclear(said, status, "models") == []) == is_clear


def test_resume_point_that_can_not_be_written_must_be_said():
    assert unclear("pretrain epoch 8/8", 0, ".resume")
    assert not unclear("warning: /a/.resume/pretrain-1.pt: No space left", 0, ".resume")


def test_server_that_is_away_is_said_once_by_each_stage():
    line = "MLflow can't be reached (refused)\n"
    assert said_once(f"Running stage 'a':\n{line}Running stage 'b':\n{line}") == []
    assert said_once(f"Running stage 'a':\n{line}{line}") == ["a said 2 times that MLflow is away"]
    assert said_once("Running stage 'a':\n") == ["nobody said that MLflow is away"]


# what is drawn


def test_kills_are_drawn_from_the_seed_and_the_number(home):
    assert draw_kill(7, 1, home) == draw_kill(7, 1, home)
    assert draw_kill(7, 1, home) != draw_kill(7, 2, home)
    assert draw_fault(3, 1, home) == draw_fault(3, 1, home)


def test_fifty_kills_hit_every_stage_by_every_signal_and_everybody(home):
    kills = [draw_kill(number, 0, home) for number in range(1, 51)]
    assert Counter(kill.training.name for kill in kills).keys() == {t.name for t in home.trainings}
    assert min(Counter(kill.training.name for kill in kills).values()) == 10
    assert len({(kill.training.name, kill.signal) for kill in kills}) == 15
    assert {kill.target for kill in kills} == {"trainer", "group", "dvc"}
    assert {kill.phase for kill in kills} == {"start", "training", "end"}
    assert all(kill.signal == signal.SIGKILL for kill in kills if kill.write)
    written = {kill.write.place for n in range(1, 200) if (kill := draw_kill(n, 0, home)).write}
    assert written == {"models", "plots", "metrics", ".resume", "dvc.lock", ".dvc/cache", ".dvc/tmp"}
    assert not any(kill.signal == signal.SIGINT and kill.target == "dvc" for kill in kills)


def test_faults_hit_every_place_with_every_error(home):
    writes = [draw_fault(number, 0, home).write for number in range(1, 17)]
    assert len({(write.place, write.fault) for write in writes}) == 16
    assert {w.place for w in writes if w.of_dvc} == {"dvc.lock", ".dvc/cache", ".dvc/tmp"}


def test_writes_are_those_that_were_counted(home):
    training = home.trainings[0]
    last = chaos_cases.Write(of_dvc=False, place="models", at=0.999, fault="EIO")
    assert last.nth(home, training) == training.writes["models"]
    assert replace(last, at=0.0).nth(home, training) == 1
    of_dvc = replace(last, of_dvc=True, place="dvc.lock")
    assert of_dvc.nth(home, training) == home.dvc_writes["dvc.lock"] // len(home.entries)


def test_phases_are_timed_between_their_lines():
    marks = [(0.0, "prepare", "start"), (2.0, "sole@8", "start"), (5.0, "sole@8", "training")]
    marks += [(6.0, "sole@8", "end"), (8.0, "", "")]
    assert chaos_home.phases(marks) == {"sole@8": {"start": 3.0, "training": 1.0, "end": 2.0}}


def test_lines_that_begin_a_phase():
    marked = chaos_home._marked
    assert marked("Running stage 'static@first-3':\n", "pretrain") == ("static@first-3", "start")
    assert marked("pretrain epoch 1/16: accuracy 0.1\n", "pretrain") == ("pretrain", "training")
    assert marked("pretrain epoch 2/16: accuracy 0.1\n", "pretrain") == ("pretrain", "")
    assert marked("pretrain epoch 16/16: accuracy 0.1\n", "pretrain") == ("pretrain", "end")


def test_stages_come_with_those_that_they_need():
    assert chaos_home.needed(["static", "sole"]) == ["pretrain", "sole", "static"]
    assert chaos_home.needed(["finetune"]) == ["pretrain", "curriculum", "finetune"]


# the verdict


def outcomes(home: Home, *, lost: bool = False) -> list[Outcome]:
    losses = ["something"] if lost else []
    return [
        Outcome(name=f"kill {number}", stage=training.name, kind="SIGKILL", target="dvc", losses=losses)
        for number, training in enumerate(home.trainings, 1)
    ]


def test_verdict(home, capsys):
    cases = [draw_kill(number, 0, home) for number in range(1, 6)]
    assert chaos.verdict(cases, outcomes(home), home, 9) == 0
    assert chaos.verdict(cases, outcomes(home, lost=True), home, 9) == 1
    assert '--seed 9 --only "kill 3"' in capsys.readouterr().out
    assert chaos.verdict(cases, outcomes(home)[1:], home, 9) == 1
    assert "time was up after 4 of 5 cases" in capsys.readouterr().out
    home.library = None
    assert chaos.verdict(cases, outcomes(home), home, 9) == 3
    assert "left out" in capsys.readouterr().out


def test_summary_names_stages_that_were_not_hit(home):
    assert chaos.summary(outcomes(home), home) == "kills: 5, stages hit: all, losses: 0"
    missed = chaos.summary(outcomes(home, lost=True)[:4], home)
    assert missed == "kills: 4, stages hit: 4, not static@first-3, losses: 4"


def test_when_time_is_up_nothing_new_begins(home):
    home.deadline = time.monotonic() - 1
    cases = [draw_kill(number, 0, home) for number in range(1, 4)]
    assert chaos.run_all(cases, home, 2, print) == []


def test_case_with_a_loss_keeps_its_folder(home, monkeypatch):
    case = draw_kill(1, 0, home)
    folder = home.folder / "kill-1"
    for losses in ([], ["something"]):
        folder.mkdir()
        outcome = Outcome(name=case.name, stage="pretrain", losses=losses)
        monkeypatch.setattr(chaos, "run_kill", lambda *_, outcome=outcome: outcome)
        chaos.run_case(case, home)
        assert folder.exists() == bool(losses)


# writes that fail


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    made = compile_shim(tmp_path_factory.mktemp("shim"))
    if made is None:
        pytest.skip("no C compiler, or no Linux")
    return made


WRITER = """
import os, sys
def attempt(action):
    try:
        action()
        print('ok')
    except OSError as error:
        print(error.errno)
def write(path):
    with open(path, 'wb', buffering=0) as file:
        done = file.write(b'12345678')
        if done < 8:
            file.write(b'5678')
        os.fsync(file.fileno())
for path in ('models/a', 'other/a', 'models/b', 'models/c'):
    attempt(lambda: write(path))
attempt(lambda: os.rename('other/a', 'models/d'))
"""


def run_writer(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name in ("models", "other"):
        (folder / name).mkdir(parents=True)
    words = [sys.executable, "-c", WRITER]
    return subprocess.run(words, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


NO_SPACE, BROKEN = str(errno.ENOSPC), str(errno.EIO)


@pytest.mark.parametrize(
    ("nth", "fault", "later", "said", "hit"),
    [  # each file is an open, a write and an fsync; the renaming is the tenth call
        (0, "ENOSPC", False, ["ok"] * 5, ""),
        (1, "ENOSPC", False, [NO_SPACE, "ok", "ok", "ok", "ok"], "open models/a"),
        (5, "ENOSPC", False, ["ok", "ok", NO_SPACE, "ok", "ok"], "write models/b"),
        (6, "EIO", False, ["ok", "ok", BROKEN, "ok", "ok"], "fsync models/b"),
        (6, "EIO", True, ["ok", "ok", BROKEN, BROKEN, BROKEN], "fsync models/b"),
        (10, "EIO", False, ["ok", "ok", "ok", "ok", BROKEN], "rename models/d"),
    ],
)
def test_the_nth_write_under_a_place_fails_and_no_other(library, tmp_path, nth, fault, later, said, hit):
    folder = tmp_path / "copy"
    variables = preloaded(library, folder, ["models"], nth=nth, fault=fault, later=later)
    assert run_writer(folder, variables).stdout.split() == said
    assert chaos_home.failed_write(folder) == hit


def test_write_that_fails_leaves_half_of_it(library, tmp_path):
    folder = tmp_path / "copy"
    run_writer(folder, preloaded(library, folder, ["models"], nth=5, fault="ENOSPC"))
    assert (folder / "models/b").read_bytes() == b"1234"


def test_kill_comes_in_the_middle_of_a_write(library, tmp_path):
    folder = tmp_path / "copy"
    done = run_writer(folder, preloaded(library, folder, ["models"], nth=5, fault="KILL"))
    assert done.returncode == -signal.SIGKILL
    assert (folder / "models/b").read_bytes() == b"1234"
    assert not (folder / "models/c").exists()


def test_only_the_process_that_is_meant_is_hit(library, tmp_path):
    folder = tmp_path / "copy"
    variables = preloaded(library, folder, ["models"], nth=1, fault="EIO", process="-m stages.")
    assert run_writer(folder, variables).stdout.split() == ["ok"] * 5


def test_neighbour_whose_name_begins_the_same_is_not_hit(library, tmp_path):
    folder = tmp_path / "copy"
    variables = preloaded(library, folder, ["mod", "models/aa"], nth=1, fault="EIO")
    assert run_writer(folder, variables).stdout.split() == ["ok"] * 5


def test_writes_are_counted_by_command_and_place(library, tmp_path):
    folder = tmp_path / "copy"
    run_writer(folder, preloaded(library, folder, ["models", "other", "plots"]))
    (counts,) = chaos_home.count_writes(folder).values()
    assert counts == {"models": 10, "other": 3}


def test_without_a_compiler_there_is_no_shim(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert compile_shim(tmp_path) is None


# a server's learning curves


def test_points_that_the_server_lacks_are_seen(tmp_path):
    from mlflow import MlflowClient

    (tmp_path / "plots").mkdir()
    with (tmp_path / "plots/pretrain.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("epoch", "loss"), (1, 0.5), (2, 0.25)])
    uri = f"sqlite:///{tmp_path / 'server.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("a", artifact_location=tmp_path.as_uri())
    run = client.create_run(experiment, tags={"blockdrop.role": "parent"}).info.run_id
    client.log_metric(run, "pretrain/loss", 0.5, step=1)
    lost = ["1 points of pretrain/loss are not in MLflow"]
    assert chaos_cases.missing_points(tmp_path, uri) == lost
    client.log_metric(run, "pretrain/loss", 0.25, step=2)
    assert chaos_cases.missing_points(tmp_path, uri) == []


# all of it, small


@pytest.mark.sweep  # a minute; `make chaos` does more of it
def test_a_few_kills_and_a_failing_write_lose_nothing(tmp_path):
    words = ["--kills", "3", "--faults", "1", "--servers", "0", "--stages", "sole", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "chaos", *words, "--keep", str(tmp_path / "kept")],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3, stages hit: all, losses: 0" in done.stdout
    assert {path.name for path in (tmp_path / "kept").glob("kill*")} == set()
