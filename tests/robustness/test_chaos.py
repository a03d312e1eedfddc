"""The chaos harness: each of its checks can fail, its faults hit what they should, and it runs."""

import csv
import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
from chaos import __main__ as chaos
from chaos import cases, checks
from chaos.cases import Outcome, draw_kill, draw_write, missing_points, unclear_messages
from chaos.sandbox import DVC, PLACES, Sandbox, Training
from chaos.write_faults import compile_library, count_writes, failed_write, preloaded
from repository_copy import ROOT, environment
from sandbox import digests

OBJECT = ".dvc/cache/files/md5/99/914b932bd37a50b983c5e7c90ae93b"  # the MD5 of {}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with outs, a store and a cached object, all as they should be."""
    folder = tmp_path / "copy"
    for name in ("models/pretrain/model.json", "metrics/times/pretrain.json", OBJECT, ".dvc/tmp/lock",
                 ".dvc/tmp/half.tmp", ".resume/a.lock", ".resume/pretrain-a.finished.pt"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        store.execute("create table runs (run_uuid, name, status, lifecycle_stage)")
        store.execute("insert into runs values ('1', 'pretrain', 'FINISHED', 'active')")
        store.execute("insert into runs values ('2', 'gone', 'RUNNING', 'deleted')")
    return folder


@pytest.fixture
def sandbox(checkout, monkeypatch) -> Sandbox:
    """Trainings that are made up, and the checkout as a copy beside them."""
    writes = {(process, place): 50 for process, places in PLACES.items() for place in places}
    return Sandbox(
        folder=checkout.parent,
        library=Path("faults.so"),
        trainings=[
            Training(name=name, seconds=(2.0, 3.0), writes=writes)
            for name in ("pretrain", "curriculum", "finetune", "sole@8", "static@first-3")
        ],
        outs=digests(checkout),
    )


def fake_dvc(folder: Path, script: str) -> dict[str, str]:
    """Variables with which `dvc` is a shell script, and finds nothing changed."""
    (folder / "bin").mkdir()
    program = folder / "bin/dvc"
    program.write_text(f"#!/bin/sh\n{script}\nif [ $1 = status ]; then echo {{}}; fi\n")
    program.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def violations(checkout: Path, sandbox: Sandbox, script: str = "") -> list[str]:
    return checks.all_violations(
        checkout,
        outs=sandbox.outs,
        store=checkout / "mlflow.db",
        environment=fake_dvc(checkout.parent, script),
    )


# each check can fail


def test_checks_pass_on_a_checkout_as_it_should_be(checkout, sandbox):
    (checkout / "metrics/times/pretrain.json").write_text('{"seconds": 1}')  # depends on the clock
    assert violations(checkout, sandbox) == []


def leave_a_run(checkout: Path) -> None:
    with closing(sqlite3.connect(checkout / "mlflow.db")) as store, store:
        store.execute("insert into runs values ('3', 'finetune', 'RUNNING', 'active')")


def write(name: str):
    return lambda checkout: (checkout / name).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("models/pretrain/model.json"), "models/pretrain/model.json differs"),
        (lambda c: (c / "models/pretrain/model.json").unlink(), "models/pretrain/model.json is missing"),
        (write("models/pretrain/more"), "models/pretrain/more is new"),
        (write(OBJECT), f"cached {OBJECT} is damaged"),
        (write(".resume/half.tmp"), ".resume/half.tmp is left over"),
        (write(".resume/pretrain-a.fresh.pt"), ".resume/pretrain-a.fresh.pt is left over"),
        (leave_a_run, "run finetune (3) is left RUNNING"),
    ],
)
def test_checks_see_each_violation(checkout, sandbox, spoil, message):
    spoil(checkout)
    assert violations(checkout, sandbox) == [message]


def test_checks_see_a_status_that_is_not_clean(checkout, sandbox):
    found = violations(checkout, sandbox, "echo pretrain changed; exit 1")
    assert found == ["dvc status is not clean: pretrain changed"]


@pytest.mark.parametrize("name", [".resume/a.lock", ".dvc/tmp/lock"])
def test_checks_see_a_held_lock(checkout, sandbox, name):
    with (checkout / name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert violations(checkout, sandbox) == [f"{name} is held"]


def test_checks_see_and_end_a_process_that_is_left(checkout):
    with subprocess.Popen(["sleep", "60"], cwd=checkout) as left:
        (message,) = checks.left_processes(checkout, seconds=0)
        assert "sleep 60" in message
        assert left.wait(5) == -signal.SIGKILL
    with subprocess.Popen(["sleep", "0.3"], cwd=checkout):
        assert checks.left_processes(checkout, seconds=5) == []


# a plain `dvc repro` after the fault


RUNNING = "echo \"Running stage 'pretrain':\""


@pytest.mark.parametrize(
    ("state", "script", "resumed", "violations"),
    [
        ("", f"{RUNNING}; echo 'pretrain: resuming after epoch 3 of 8'", True, []),
        ("", RUNNING, False, ["the training started over beside its resume point"]),
        (".fresh", RUNNING, False, []),
        (".finished", "echo broken; exit 3", False, ["dvc repro: exit status 3: broken\n"]),
    ],
    ids=["resumed", "started over", "half of a point", "failed"],
)
def test_recover_runs_dvc_and_judges_it(
    sandbox, checkout, monkeypatch, state, script, resumed, violations
):
    (checkout / "models/pretrain/model.json").unlink()
    (checkout / ".resume/pretrain-a.finished.pt").unlink()
    (checkout / f".resume/pretrain-a{state}.pt").touch()
    restored = "printf '{}' > models/pretrain/model.json; rm .resume/*.pt"
    variables = fake_dvc(checkout.parent, f"if [ $1 = repro ]; then {restored}; {script}; fi")
    monkeypatch.setattr(Sandbox, "environment", lambda _: os.environ | variables)
    monkeypatch.setenv("PATH", variables["PATH"])  # where Popen looks
    monkeypatch.setattr(sys, "executable", "true")  # nothing to repair
    outcome = Outcome(name="kill 1", stage="pretrain")
    cases.recover(draw_kill(1, 0, sandbox), sandbox, checkout, outcome)
    assert outcome.resumed == resumed
    assert outcome.violations == violations


@pytest.mark.parametrize(
    ("output", "status", "place", "clear"),
    [
        ("error: models/pretrain/model.json: No space left; free some space", 1, "models", True),
        ("error: No space left; free some space, and repeat", 1, "models", False),
        ("error: models/pretrain/model.json: No space left", 1, "models", False),
        ("error: models/a: b; c\nerror: models/a: b; c", 1, "models", False),
        ("Traceback (most recent call last)\nerror: models/a: b; c", 1, "models", False),
        ("pretrain epoch 8/8", 0, "models", True),
        ("pretrain epoch 8/8", 0, ".resume", False),
        ("warning: /a/.resume/pretrain-1.pt: No space left", 0, ".resume", True),
    ],
)
def test_unclear_messages(output, status, place, clear):
    assert (unclear_messages(output, status, place) == []) == clear


def test_missing_points_are_those_that_the_server_lacks(tmp_path, monkeypatch):
    (tmp_path / "plots").mkdir()
    with (tmp_path / "plots/pretrain.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("epoch", "loss"), (1, 0.5), (2, 0.25)])
    client = Mock()
    client.search_experiments.return_value = []
    client.search_runs.return_value = [Mock()]
    points = [Mock(step=1, value=0.5)]
    client.get_metric_history.return_value = points
    monkeypatch.setitem(sys.modules, "mlflow", Mock(MlflowClient=lambda tracking_uri: client))
    assert missing_points(tmp_path, "") == ["1 points of pretrain/loss are not in MLflow"]
    points.append(Mock(step=2, value=0.25))
    assert missing_points(tmp_path, "") == []
    client.search_runs.return_value = []
    assert missing_points(tmp_path, "") == ["0 runs of experiments instead of one"]


# what is drawn, and the verdict


def test_fifty_kills_hit_every_stage_signal_and_place(sandbox):
    kills = [draw_kill(number, 0, sandbox) for number in range(1, 51)]
    assert kills[6] == draw_kill(7, 0, sandbox) != draw_kill(7, 1, sandbox)
    hit = {(kill.training.name, kill.fault.removeprefix("SIG")) for kill in kills}
    assert hit == set(product([t.name for t in sandbox.trainings], ["KILL", "TERM", "INT"]))
    assert {kill.target for kill in kills if not kill.place} == {"trainer", "group", "dvc"}
    places = {kill.place for number in range(200) if (kill := draw_kill(number, 0, sandbox)).place}
    assert places == {place for names in PLACES.values() for place in names} - {"mlflow.db"}


def test_writes_fail_at_every_place_with_every_error(sandbox):
    drawn = [draw_write(number, 0, sandbox) for number in range(1, 17)]
    assert len({(case.place, case.fault) for case in drawn}) == 16
    assert {case.place for case in drawn if case.target == DVC} == set(PLACES[DVC])
    assert all(1 <= case.nth <= 50 for case in drawn)


def test_a_violation_decides_the_status_and_keeps_its_folder(sandbox, monkeypatch, capsys):
    results = [
        lambda case, _: Outcome(name=case.name, stage=case.training.name),
        lambda *_: 1 / 0,
    ]
    for failed, run in enumerate(results):
        monkeypatch.setattr(cases, "run", run)
        (sandbox.folder / "kill-1").mkdir()
        outcomes = chaos.run_all([draw_kill(1, 0, sandbox)], sandbox, 1)
        assert chaos.summary(outcomes, sandbox, 9) == failed
        said = capsys.readouterr().out
        assert "kills: 1, stages hit: 1, not curriculum, finetune, sole@8, static@first-3" in said
        assert f"violations: {failed}" in said
        assert ('--seed 9 --only "kill 1"' in said) == failed == (sandbox.folder / "kill-1").exists()


# writes that fail


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library"))


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
    return subprocess.run(
        [sys.executable, "-c", WRITER],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


NO_SPACE, BROKEN = str(errno.ENOSPC), str(errno.EIO)


@pytest.mark.parametrize(
    ("nth", "fault", "later", "printed", "hit"),
    [  # each file is an open, a write and an fsync; the renaming is the tenth call
        (1, "ENOSPC", False, [NO_SPACE, "ok", "ok", "ok", "ok"], "open models/a"),
        (5, "ENOSPC", False, ["ok", "ok", NO_SPACE, "ok", "ok"], "write models/b"),
        (6, "EIO", True, ["ok", "ok", BROKEN, BROKEN, BROKEN], "fsync models/b"),
        (10, "EIO", False, ["ok", "ok", "ok", "ok", BROKEN], "rename models/d"),
    ],
)
def test_the_nth_write_under_a_place_fails_and_no_other(
    library, tmp_path, nth, fault, later, printed, hit
):
    folder = tmp_path / "copy"
    variables = preloaded(library, folder, ["models"], nth=nth, fault=fault, later=later)
    assert run_writer(folder, variables).stdout.split() == printed
    assert failed_write(folder) == hit


def test_kill_comes_in_the_middle_of_a_write(library, tmp_path):
    folder = tmp_path / "copy"
    done = run_writer(folder, preloaded(library, folder, ["models"], nth=5, fault="KILL"))
    assert done.returncode == -signal.SIGKILL
    assert (folder / "models/b").read_bytes() == b"1234"
    assert not (folder / "models/c").exists()


def test_writes_are_counted_by_process_and_place(library, tmp_path):
    folder = tmp_path / "copy"
    run_writer(folder, preloaded(library, folder, ["models", "other", "plots"]))
    assert count_writes(folder, ("-c", DVC)) == {("-c", "models"): 10, ("-c", "other"): 3}


# all of it, small


@pytest.mark.serial  # its faults come at moments that were measured
@pytest.mark.slow  # a minute; `make chaos` does more of it
def test_a_few_kills_and_a_failing_write_lose_nothing(tmp_path):
    counts = ["--kills", "3", "--writes", "1", "--servers", "0"]
    options = [*counts, "--stages", "curriculum", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "chaos", *options, "--keep", str(tmp_path / "kept")],
        cwd=ROOT, env=environment() | {"PYTHONPATH": "tests"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3, stages hit: all, violations: 0" in done.stdout
    assert set((tmp_path / "kept").glob("kill*")) == set()
