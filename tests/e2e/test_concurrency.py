"""Several DVC processes at once, and one beside a stage that another has left behind."""

import contextlib
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from repository_copy import Copy, ran
from waiting import is_training, start, wait_for

pytestmark = pytest.mark.e2e
GAMMAS = (1, 2, 5, 10)


def trainer_below(pid: int) -> psutil.Process:
    """The stage that a DVC process runs: not the compiler or the like that the stage may run itself."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a compiler ends between the two questions
            found += [child] if child.cmdline()[1:] == ["-m", "stages.pretrain"] else []
    (trainer,) = found
    return trainer


def test_of_two_repros_one_runs_and_the_other_is_told_who_does(copy):
    first = start(copy, "dvc", "repro", "pretrain")
    wait_for(lambda: is_training(copy, "pretrain"))
    second = copy.run("dvc", "repro", "pretrain", check=False)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    assert "exit 0" not in second
    assert f"(PID {first.pid})" in second
    assert "Traceback" not in second
    assert ran(copy.run("dvc", "repro", "pretrain")) == []
    assert copy.run("dvc", "status", "pretrain", check=False).startswith("exit 0\nData and pip")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.sweep)]
)
def test_repro_goes_on_from_a_trainer_whose_dvc_was_killed(number, copy):
    first = start(copy, "dvc", "repro", "pretrain")
    wait_for(lambda: is_training(copy, "pretrain"))
    trainer = trainer_below(first.pid)
    first.send_signal(number)
    first.wait()  # else its process id is still there
    output = copy.run("dvc", "repro", "pretrain")
    assert "pretrain: resuming after epoch" in output
    assert not trainer.is_running()
    assert "up to date" in copy.run("dvc", "status", "pretrain")
    outs = copy.outs()
    again = copy.run(sys.executable, "-m", "stages.pretrain")  # DVC has recorded it: trained anew
    assert "pretrain epoch 1/40" in again
    assert copy.outs() == outs


def logs_of(copy: Copy) -> list[str]:
    """What every experiment of the queue printed."""
    folder = copy.folder / ".dvc/tmp/exps/run"
    return [path.read_text() for path in sorted(Path(folder).rglob("*.out"))]


@pytest.mark.sweep  # minutes
def test_four_queue_workers_on_a_fresh_clone_pretrain_once(copy):
    for gamma in GAMMAS:
        copy.run("dvc", "exp", "run", "--queue", "-n", f"g{gamma}", "-S", f"gamma={gamma}", "finetune")
    copy.run("dvc", "queue", "start", "-j", "4")
    deadline = time.monotonic() + 600
    while {"Queued", "Running"} & set((status := copy.run("dvc", "queue", "status")).split()):
        assert time.monotonic() < deadline, status
        if "0 active, 0 idle" in status:  # a worker of DVC 3.67 dies now and then
            copy.run("dvc", "queue", "start", "-j", "4")
        time.sleep(1)
    assert "Failed" not in status, "\n".join(logs_of(copy))
    said = "\n".join(logs_of(copy))
    assert said.count("pretrain epoch 1/40") == 1, said
    assert said.count("curriculum epoch 1/4:") == 1, said
    assert said.count("finetune epoch 1/3") == len(GAMMAS), said
    shown = copy.run("dvc", "exp", "show", "--csv")
    assert all(f"g{gamma}," in shown for gamma in GAMMAS)
