"""One training over two hosts: it ends as on one, and what kills a host or cuts the cable loses nothing.

The hosts are network namespaces (`hosts.py`), so that all but the cable and the second machine is real:
torchrun by the command of docs/distributed.md, addresses, interfaces, connections, folders of their own.
"""

import dataclasses
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hosts
import pytest
import safetensors.torch
import torch
from hosts import Host
from repository_copy import TINY, Copy, make_copy
from waiting import wait_for

from pipeline.data.dataset import load_split
from pipeline.inference.predict import predict_policy
from pipeline.models import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason := hosts.why_impossible()), reason=str(reason)),
]

# The ResNet by SGD: Adam makes whole steps of the float noise of gradients that are next to nothing.
CHANGES = TINY | {
    "data": {"image_size": 8, "test_fraction": 0.6},  # few images to train on
    "finetune": {"epochs": 6, "optimizer": "sgd", "lr": 0.01},
}
ALL_BUT = """
from pipeline.config import load
from stages import curriculum, finetune, policy_pretrain, prepare, pretrain, prune
params = load()
for stage in (prepare, pretrain, prune, policy_pretrain, curriculum, finetune):
    stage.main(params)
"""
STAGE = ("-m", "stages.finetune")
SILENCE = 4  # seconds without a sign of the other host after which it counts as gone
# the same stage with slower steps, and a pause of the first host after each save
SLOW_STAGE = f"""
import sys, time
from pipeline.infra import processes
from pipeline.infra.resume import ResumePoint
from pipeline.policy.learner import PolicyLearner
from stages import finetune
from stages.support import common
processes.SILENCE_SECONDS = {SILENCE}
def then_sleep(function, seconds):
    def call(*arguments):
        result = function(*arguments)
        time.sleep(seconds)
        return result
    return call
PolicyLearner.step = then_sleep(PolicyLearner.step, 0.15)
ResumePoint.save = then_sleep(ResumePoint.save, float(sys.argv[1]))
common.run(finetune.main, trains=True)
"""
CODE = "pipeline/policy/objectives.py"  # on which the stage depends
SLOW = ("--no-python", sys.executable, "-c", SLOW_STAGE)
# a stage that does nothing but meet
MEETING = """
from datetime import timedelta
from pipeline.infra import processes
from stages.support import common
processes.MEETING_TIMEOUT = timedelta(seconds=8)
common.run(lambda params: print("they have met"), trains=True)
"""
GONE = r"error{}: another process of this training has ended or can't be reached \(.*\); .*; repeat"
RESULTS = (
    "models/finetune",
    "metrics/finetune.json",
    "metrics/times/finetune.json",
    "plots/finetune.csv",
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a host's part of a training ended, and how long after the fault."""

    status: int
    out: str
    err: str
    seconds: float


@pytest.fixture(scope="module")
def by_one(tmp_path_factory) -> Copy:
    """All stages, in one process."""
    copy = make_copy(tmp_path_factory.mktemp("one"), changes=CHANGES)
    copy.python(ALL_BUT)
    return copy


@pytest.fixture(scope="module")
def pair(by_one, tmp_path_factory) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each with a copy of the stages before finetune."""
    parent = tmp_path_factory.mktemp("hosts")
    folders = parent / "gpu0", parent / "gpu1"
    for folder in folders:
        shutil.copytree(by_one.folder, folder)
        clear(folder)
    with hosts.two_hosts(folders) as both:
        yield both


def clear(folder: Path) -> None:
    """Take away the stage's result and its resume points."""
    for path in (folder / name for name in (*RESULTS, ".resume")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def results(host: Host) -> dict[str, bytes]:
    """What the stage left on a host, without what depends on the clock."""
    return {
        path.relative_to(host.folder).as_posix(): path.read_bytes()
        for name in RESULTS
        for path in sorted([host.folder / name, *(host.folder / name).rglob("*")])
        if path.is_file() and "times" not in path.parts
    }


def train(
    pair: tuple[Host, Host],
    program: Sequence[str],
    *,
    fault: Callable[[], None] | None = None,
    after: float = 0.4,
    variables: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Start both hosts; `fault` happens some seconds after the next save."""
    saved = resume_points(pair[0])
    running = [host.torchrun(*program, master=pair[0], variables=variables) for host in pair]
    try:
        if fault is not None:
            wait_for(
                lambda: resume_points(pair[0]) - saved or any(p.poll() is not None for p in running)
            )
            time.sleep(after)
            fault()
        ended, began = {}, time.monotonic()
        while len(ended) < len(running):
            assert time.monotonic() < began + 120, "a host goes on for ever"
            for process in running:
                if process.poll() is not None and process not in ended:
                    ended[process] = time.monotonic() - began
            time.sleep(0.05)
    finally:
        for host in pair:
            host.kill()
        texts = [process.communicate() for process in running]
    return [
        Ended(process.returncode, *text, ended[process])
        for process, text in zip(running, texts, strict=True)
    ]


def resume_points(host: Host) -> set[tuple[str, int]]:
    points = (host.folder / ".resume").glob("finetune-*.pt")
    return {(p.name, p.stat().st_ino) for p in points if re.fullmatch(r"finetune-\w+\.pt", p.name)}


@pytest.fixture(scope="module")
def uninterrupted(pair) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What an uninterrupted training leaves on each host."""
    for host in pair:
        clear(host.folder)
    for ended in train(pair, STAGE):
        assert ended.status == 0, ended.err
    return results(pair[0]), results(pair[1])


@pytest.fixture(scope="module")
def faults(pair, uninterrupted) -> dict[str, list[Ended]]:
    """How both hosts ended at each of three faults of one training, and when it was left alone."""
    first, second = pair
    for host in pair:
        clear(host.folder)
    ended = {
        "second killed": train(pair, (*SLOW, "0"), fault=second.kill),
        "first killed": train(pair, (*SLOW, "0"), fault=first.kill),
        # the second host has sent its part of a step by then, and only waits for the first one's
        "cut": train(pair, (*SLOW, "9"), fault=second.cut_cable, after=2),
    }
    second.mend_cable()
    assert results(first) == results(second) == {}
    return ended | {"none": train(pair, STAGE)}


def decisions(networks: Path, prepared: Path) -> torch.Tensor:
    """The greedy policy's actions on the test images, [M, K]."""
    trained = checkpoint.load(networks)
    test = load_split(prepared, "test", torch.device("cpu"))
    logits = predict_policy(trained.need_policy_net(), test, normalisation=trained.normalisation)
    return logits > 0


def test_two_hosts_train_as_one_process_does(by_one, uninterrupted, tmp_path):
    one, prepared = by_one.folder / "models/finetune", by_one.folder / "data/prepared"
    for name, content in uninterrupted[0].items():
        if name.startswith("models/finetune/"):
            (tmp_path / Path(name).name).write_bytes(content)
    actions = decisions(one, prepared), decisions(tmp_path, prepared)
    assert len(torch.unique(actions[0], dim=0)) > 5  # the policy looks at the image
    assert torch.equal(*actions)
    weights = [safetensors.torch.load_file(folder / checkpoint.WEIGHTS) for folder in (one, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        # the stage trains the policy by Adam, whose step is up to 1e-3 here whatever the gradient is
        atol = 1e-4 if name.startswith("policy_net.") else 1e-5
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=atol)


def test_the_first_host_alone_writes(by_one, uninterrupted):
    first, second = uninterrupted
    assert second == {}
    assert sorted(first) == sorted(
        name for name in by_one.outs() if name.startswith(tuple(RESULTS)) and "times" not in name
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_host_ends_the_other_with_a_message(killed, faults):
    ended = faults["second killed" if killed else "first killed"]
    assert ended[killed].status == -9
    left = ended[1 - killed]
    assert left.status == 1
    assert re.search(GONE.format("" if killed else " in process 2 of 2"), left.err), left.err
    assert left.seconds < 30


def test_cut_cable_ends_both_hosts_with_a_message(faults):
    for ended, process in zip(faults["cut"], ("", " in process 2 of 2"), strict=True):
        assert ended.status == 1
        assert re.search(GONE.format(process), ended.err), ended.err
        assert SILENCE - 1 < ended.seconds < SILENCE + 40


def test_hosts_started_again_end_in_the_same_bytes(pair, faults, uninterrupted):
    for fault in ("first killed", "cut", "none"):
        assert re.search(r"finetune: resuming after epoch [1-5] of 6", faults[fault][0].out), fault
    for ended in faults["none"]:
        assert ended.status == 0, ended.err
    assert (results(pair[0]), results(pair[1])) == uninterrupted


@pytest.fixture
def fresh(pair) -> Iterator[tuple[Host, Host]]:
    """The hosts without a result; what a test changes of the second one's files is put back."""
    kept = {name: (pair[1].folder / name).read_bytes() for name in ("params.yaml", CODE)}
    for host in pair:
        clear(host.folder)
    yield pair
    for name, content in kept.items():
        (pair[1].folder / name).write_bytes(content)


def test_other_params_on_the_second_host_are_refused_by_both(fresh):
    path = fresh[1].folder / "params.yaml"
    path.write_text(path.read_text().replace("epochs: 6", "epochs: 0"))  # it would train nothing
    words = "params.yaml of process 2 of 2 differs from that of process 1 in finetune.epochs; give every"
    for ended in train(fresh, STAGE):
        assert ended.status == 1
        assert words in ended.err, ended.err
    assert resume_points(fresh[0]) == set()
    assert results(fresh[0]) == {}


def test_another_commit_on_the_second_host_is_refused(fresh):
    path = fresh[1].folder / CODE
    path.write_text(path.read_text() + "# another commit\n")
    first, second = train(fresh, STAGE)
    assert (first.status, second.status) == (1, 1)
    assert (
        "error in process 2 of 2: finetune: this process has other parameters, data, code" in second.err
    )
    assert re.search(GONE.format(""), first.err), first.err
    assert "epoch 1" not in first.out
    assert resume_points(fresh[0]) == set()
    assert results(fresh[0]) == {}


def test_hosts_that_do_not_reach_each_other_end_with_a_message(pair):
    """Each offers the address of its loopback."""
    program = ("--no-python", sys.executable, "-c", MEETING)
    ended = train(pair, program, variables={"GLOO_SOCKET_IFNAME": "lo"})
    for host, process in zip(ended, ("", " in process 2 of 2"), strict=True):
        assert host.status == 1
        assert re.search(GONE.format(process), host.err), host.err
        assert "they have met" not in host.out
