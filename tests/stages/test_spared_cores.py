"""Threads beside other work: fewer while it lasts, and two trainings together are faster than one."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from repository_copy import make_workplace

from stages.support import spared_cores
from stages.support.spared_cores import SparedCores

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BUSY = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
TRAINING = """
import sys, time
import pipeline, torch
from pipeline.models.resnet_cifar import cifar_resnet
from stages.support.spared_cores import SparedCores
settle, measure = map(float, sys.argv[1:])
network = cifar_resnet(depth=32, width=16, num_classes=10).to(memory_format=torch.channels_last)
images = torch.randn(64, 3, 16, 16).to(memory_format=torch.channels_last)
labels = torch.randint(10, (64,))
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
cores = SparedCores(torch.device("cpu"))
def steps(seconds):
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        cores.adapt()
        count += 1
    return count / (time.monotonic() - begun)
steps(settle)
print(steps(measure))
"""


@pytest.fixture
def machine(monkeypatch):
    """Four cores and a clock; `look(others)` is a second in which others keep so many cores busy."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(spared_cores, "usable_cores", lambda: [0, 1, 2, 3])
    state = {"clock": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr(SparedCores, "_measure", lambda self: tuple(state.values()))
    monkeypatch.setattr(spared_cores.time, "monotonic", lambda: state["clock"])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    cores = SparedCores(CPU)

    def look(others, own=1.5):
        for key, more in (("clock", 1.0), ("busy", others + own), ("own", own)):
            state[key] += more
        return cores.adapt()

    look.cores = cores
    yield look
    torch.set_num_threads(before)


def test_threads_leave_the_cores_that_others_keep_busy(machine):
    assert [machine(others=2.2) for _ in range(3)] == [None, 2, None]
    assert torch.get_num_threads() == 2
    assert machine.cores.fewest == 2
    assert [machine(others=4) for _ in range(2)] == [None, 1]


@pytest.mark.parametrize(
    ("others", "own"), [((3, 0, 3, 0, 3, 0), 1.5), ((0.3,) * 6, 3.7)], ids=["bursts", "own work"]
)
def test_short_bursts_and_own_work_change_nothing(machine, others, own):
    assert [machine(others=n, own=own) for n in others] == [None] * 6
    assert torch.get_num_threads() == 4


def test_threads_come_back_when_the_others_have_gone(machine):
    for _ in range(2):
        machine(others=3)
    assert [machine(others=0) for _ in range(6)] == [None, None, None, None, 4, None]
    assert [machine(others=-1) for _ in range(6)] == [None] * 6  # clocks are not exact
    assert (machine.cores.most, machine.cores.fewest) == (4, 1)


def test_the_number_of_threads_that_the_user_set_stays(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert SparedCores(CPU).fixed
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not SparedCores(CPU).fixed
    assert SparedCores(torch.device("cuda")).fixed


def test_processes_that_decode_images_count_as_own():
    child = subprocess.Popen([sys.executable, "-c", BUSY.format(30)])
    cores = SparedCores(CPU)
    _, _, before = cores._measure()
    used = os.times()  # of this process alone
    child_used = 0.0
    while child_used < 0.5:
        child_used = sum(spared_cores.psutil.Process(child.pid).cpu_times()[:2])
    _, _, after = cores._measure()
    alone = sum(os.times()[:2]) - sum(used[:2])
    child.kill()
    child.wait()
    assert after - before >= alone + 0.3


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    return kept | {"PYTHONPATH": str(ROOT), "BLOCKDROP_TRACKING": "off"} | changes


@pytest.mark.parametrize(
    ("package", "told", "spins"),
    [
        ("pipeline", {}, "2000"),
        ("stages", {}, "2000"),
        ("tools", {}, "2000"),
        ("pipeline", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("pipeline", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_how_threads_wait_is_said_before_pytorch_is_loaded(package, told, spins):
    code = f"import sys, os, {package}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, env=environment(**told), text=True)
    assert printed.split() == [str(spins), "False"]


@pytest.fixture(scope="module")
def on_two_cores():
    """`start(code, ...)` runs Python on the first two cores alone."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("takes two cores")
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    started = []

    def start(*arguments, **settings):
        command = ["taskset", "-c", cores, sys.executable, *arguments]
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, text=True, **settings
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.serial
def test_two_trainings_on_two_cores_do_more_than_one_alone(on_two_cores):
    def steps_a_second(trainings):
        processes = [on_two_cores("-c", TRAINING, "6", "10") for _ in range(trainings)]
        return sum(float(process.communicate(timeout=120)[0]) for process in processes)

    assert steps_a_second(2) > 1.1 * steps_a_second(1)


@pytest.mark.slow
@pytest.mark.serial
def test_a_training_beside_two_busy_loops_goes_on(on_two_cores, tmp_path):
    make_workplace(tmp_path, changes={"pretrain": {"epochs": 300}})

    def seconds():
        shutil.rmtree(tmp_path / ".resume", ignore_errors=True)
        begun = time.monotonic()
        assert on_two_cores("-m", "stages.pretrain", cwd=tmp_path).wait(timeout=300) == 0
        return time.monotonic() - begun

    alone = seconds()
    loops = [on_two_cores("-c", BUSY.format(300)) for _ in range(2)]
    beside = seconds()
    for loop in loops:
        loop.kill()
    assert beside < 2.5 * alone
