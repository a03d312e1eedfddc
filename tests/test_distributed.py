"""Several processes train as one does, one of them speaks and writes, and they stop together."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import in_processes
import psutil
import pytest
import safetensors.torch
import torch
from builders import enter_project
from in_processes import CASES
from repository_copy import ROOT, TINY, make_workplace

from pipeline import distributed
from pipeline.config import Params
from pipeline.infra import processes, ranks
from pipeline.infra.errors import UserError
from pipeline.infra.processes import PROCESSES_VARIABLE
from pipeline.infra.ranks import TORCHRUN_VARIABLES
from pipeline.tracking.store import store
from stages import sole
from stages.support import common, training

# starts its arguments in two processes: a command of Python without the word `python`
LAUNCH = (
    "import sys; from pipeline.infra import torchrun; sys.orig_argv = sys.argv; "
    "sys.exit(torchrun.launch(2))"
)
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BLOCKDROP_DEVICE": "cpu"}


def launch(*arguments: str, by: Sequence[str] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*by, sys.executable, "-c", LAUNCH, *arguments],
        env=os.environ | ENVIRONMENT, check=False, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> list[dict[str, dict]]:
    """What all cases left in each of two processes."""
    folder = tmp_path_factory.mktemp("by_two")
    done = launch(in_processes.__file__, str(folder))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Numbers and tensors of nested dictionaries and lists, by their place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: torch.tensor(float("nan")) if value is None else torch.as_tensor(value)}


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"interrupted"}))
def test_two_processes_train_as_one_does(case, by_two):
    one = flat(CASES[case]())
    first, second = (flat(results[case]) for results in by_two)
    assert first.keys() == second.keys() == one.keys()
    for name, value in one.items():
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name
        torch.testing.assert_close(
            first[name].double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def test_an_interruption_of_both_processes_changes_no_byte(by_two):
    for results in by_two:
        whole, resumed = results["finetune"], results["interrupted"]
        assert whole["results"][-1] == resumed["results"][-1]
        whole, resumed = flat(whole["weights"]), flat(resumed["weights"])
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_cases_have_what_they_are_for(by_two):
    assert by_two[0]["interrupted"]["steps"] == 2  # of six; four were before
    assert by_two[0]["some blocks"]["gradients"][-3] is None  # of the last block, which nobody ran
    assert by_two[0]["uneven"]["steps"] == 6
    assert by_two[0]["no rows"]["steps"] == 5


def test_batch_norm_of_several_processes_is_kept_as_that_of_one(small_resnet):
    before = list(small_resnet.parameters()), list(small_resnet.state_dict())
    distributed.synchronise(small_resnet)
    assert sum(isinstance(m, distributed.SyncedBatchNorm) for m in small_resnet.modules()) == 7
    assert [id(p) for p in small_resnet.parameters()] == [id(p) for p in before[0]]
    assert list(small_resnet.state_dict()) == before[1]


@pytest.fixture
def alone(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """None of torchrun's variables, on the CPU; and SIGTERM as it was, afterwards."""
    for name in (*TORCHRUN_VARIABLES, "LOCAL_RANK", PROCESSES_VARIABLE, "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    handler = signal.getsignal(signal.SIGTERM)
    yield monkeypatch
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("text", ["0", "two", "\u0662"])  # the last is a two in another script
def test_number_of_processes_that_is_none_is_refused_at_once(text, alone, capsys):
    alone.setenv(PROCESSES_VARIABLE, text)
    with pytest.raises(SystemExit) as raised:
        common.run(lambda params: pytest.fail("it was run"), trains=True)
    assert raised.value.code == 1
    assert f"error: {PROCESSES_VARIABLE} is {text!r}; set it to a number" in capsys.readouterr().err


def test_more_processes_than_devices_are_refused(alone):
    alone.setenv("BLOCKDROP_DEVICE", "cuda")
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setenv(PROCESSES_VARIABLE, "2")
    assert processes.requested_world_size(torch.device("cuda")) == 2
    alone.setenv(PROCESSES_VARIABLE, "3")
    with pytest.raises(
        UserError, match=rf"{PROCESSES_VARIABLE} is 3, but there are 2 CUDA devices; use one .*=cpu"
    ):
        processes.requested_world_size(torch.device("cuda"))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        (dict.fromkeys(TORCHRUN_VARIABLES, "2"), "RANK=2 with WORLD_SIZE=2"),
        (dict.fromkeys(TORCHRUN_VARIABLES, "x"), "RANK is 'x', which is no number"),
    ],
)
def test_place_that_no_launcher_gives_is_refused(variables, words, alone):
    for name, text in variables.items():
        alone.setenv(name, text)
    with pytest.raises(UserError, match=words) as raised:
        ranks.rank_info()
    assert "torchrun" in str(raised.value)


@pytest.mark.parametrize(
    ("master", "words"),
    [
        (
            "127.0.1.1",
            "MASTER_ADDR=127.0.1.1 stands for 127.0.1.1 here, by which no other",
        ),
        ("host.invalid", "this machine has no way to MASTER_ADDR=host.invalid"),
    ],
)
def test_address_that_other_machines_can_not_reach_is_refused(master, words, alone):
    for name, text in zip(TORCHRUN_VARIABLES, ("0", "2", master, "29500"), strict=True):
        alone.setenv(name, text)
    alone.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match=words):
        processes._interface()


def test_processes_of_one_machine_meet_by_its_loopback(alone):
    """Also where its own name stands for 127.0.1.1, as on Debian, which is listed nowhere."""
    for name, text in zip(TORCHRUN_VARIABLES, ("0", "2", "127.0.1.1", "29500"), strict=True):
        alone.setenv(name, text)
    alone.setenv("LOCAL_WORLD_SIZE", "2")
    addresses = psutil.net_if_addrs()[processes._interface()]
    assert "127.0.0.1" in {address.address for address in addresses}


def test_stage_that_trains_nothing_takes_no_processes(alone, capsys):
    for name, text in zip(TORCHRUN_VARIABLES, ("0", "2", "127.0.0.1", "1"), strict=True):
        alone.setenv(name, text)
    alone.setattr(ranks, "RANK0_SECONDS", 0)
    with pytest.raises(SystemExit):
        common.run(lambda params: pytest.fail("it was run"))
    assert "only trainings take several processes" in capsys.readouterr().err


def test_process_with_another_training_is_refused(monkeypatch):
    training._require_same_training("finetune", "abc")
    monkeypatch.setattr(distributed, "broadcast_from_rank0", lambda make: "def")  # what process 0 has
    with pytest.raises(UserError, match=r"finetune: .* other parameters, data, .*; give every machine"):
        training._require_same_training("finetune", "abc")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(3) if rank == '1' else time.sleep(60)", 3),
        ("os.kill(os.getppid(), signal.SIGINT) if rank == '0' else 0; time.sleep(60)", 130),
    ],
)
def test_status_is_that_of_the_first_process_to_fail(code, status):
    done = launch("-c", f"import os, signal, sys, time; rank = os.environ['RANK']\n{code}")
    assert done.returncode == status, done.stderr


@pytest.mark.slow  # torchrun's agent waits for 30 seconds
def test_process_that_ignores_sigterm_is_killed_after_a_failure():
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    done = launch(
        "-c", f"import os, signal, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\n{ignoring}"
    )
    assert done.returncode == 5


def test_launcher_leaves_alone_what_nohup_ignores():
    """And the processes go on without their terminal."""
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)"
    done = launch("-c", code, by=["sh", "-c", 'trap "" INT; exec "$@"', "sh"])
    assert done.returncode == 0, done.stderr


SLOW_STAGE = """
import os, signal, sys, time
from functools import partial
from pipeline.training.classification import Classification
from stages import sole
from stages.support import common
real, steps = Classification.step, []
def step(self, batch):
    steps.append(1)
    time.sleep(float(os.environ.get("TEST_SECONDS", 0)))
    if len(steps) == 5 and os.environ["RANK"] == os.environ.get("TEST_FAILS"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch)
Classification.step = step
common.run(partial(sole.main, depth=8), trains=True)
"""
# 48 images in batches of 15, 3 of them: four steps an epoch, the processes' shares are uneven
RECIPE = {"batch_size": 15, "epochs": 4, "lr": 0.01}


@pytest.fixture
def params(tmp_path, monkeypatch) -> Params:
    enter_project(tmp_path, monkeypatch)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return make_workplace(tmp_path, changes=TINY | {"pretrain": RECIPE})


def begin(command: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=os.environ | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def made(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for top in ("models", "plots", "metrics")
        for path in sorted((folder / top).rglob("*"))
        if path.is_file() and "times" not in path.parts
    }


def wait_for_a_save(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(Path(".resume").glob("sole-8-*[0-9a-f].pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stage_in_two_processes_stops_goes_on_and_writes_once(params, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    first = begin([sys.executable, "-c", SLOW_STAGE], **{PROCESSES_VARIABLE: "2", "TEST_SECONDS": "0.3"})
    wait_for_a_save(first)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 143, err
    assert err.count("stopping after this step") == 1
    assert out.count("the same command goes on from there") == 1
    assert made(tmp_path) == {}

    monkeypatch.delenv("BLOCKDROP_TRACKING")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    second = begin([*torchrun, "-m", "stages.sole", "8"])
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert out.count("2 processes") == 1
    assert out.count("sole-8: resuming after epoch") == 1
    assert out.count("sole-8 epoch 4/4") == 1
    by_two = made(tmp_path)
    with store() as (client, experiment_id):
        every = client.search_runs([experiment_id])
        runs = {run.info.run_name: run for run in every}
        assert len(runs) == len(every) == 2  # the stage's and its parent
        points = client.get_metric_history(runs["sole-8"].info.run_id, "train_loss")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert runs["sole-8"].info.status == "FINISHED"

    shutil.rmtree(".resume")
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    sole.main(params, depth=8)
    by_one = made(tmp_path)
    assert by_one.keys() == by_two.keys()
    curves = [
        torch.tensor([[float(x) for x in row.split(",")] for row in text.decode().split()[1:]])
        for text in (by_one["plots/sole/8.csv"], by_two["plots/sole/8.csv"])
    ]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    networks = [safetensors.torch.load(of["models/sole/8/model.safetensors"]) for of in (by_one, by_two)]
    torch.testing.assert_close(*networks, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(params, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    variables = {PROCESSES_VARIABLE: "2", "TEST_SECONDS": "0.3"}
    launcher = begin([sys.executable, "-c", SLOW_STAGE], **variables)
    wait_for_a_save(launcher)
    ranks = psutil.Process(launcher.pid).children()
    launcher.kill()
    out, err = launcher.communicate(timeout=60)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 2
    assert not alive
    assert "has died; stopping" in err
    assert "the same command goes on from there" in out


def test_process_that_is_killed_ends_the_others_with_a_message(params, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    failing = begin([sys.executable, "-c", SLOW_STAGE], **{PROCESSES_VARIABLE: "2", "TEST_FAILS": "1"})
    _, err = failing.communicate(timeout=120)
    assert failing.returncode == 137
    assert "error: process 2 of 2 was killed by SIGKILL; repeat" in err
    assert "Traceback" not in err
    assert made(tmp_path) == {}
