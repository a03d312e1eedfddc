"""What several test modules make: waiting."""

import re
import subprocess
import time

import pytest
from repository_copy import TINY, Copy, environment, make_copy

LONG = {"pretrain": {"epochs": 40}, "curriculum": {"epochs": 4}, "finetune": {"epochs": 3}}


@pytest.fixture
def copy(tmp_path) -> Copy:
    return make_copy(tmp_path, changes=TINY | LONG)


def start(copy: Copy, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=copy.folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_training(copy: Copy, stage: str) -> bool:
    return any(re.fullmatch(rf"{stage}-\w+\.pt", p.name) for p in (copy.folder / ".resume").glob("*"))
