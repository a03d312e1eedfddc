"""Choosing the device by the environment, and precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.device import DEVICE_VARIABLE, autocast, choose_device, describe_device
from pipeline.infra.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "has_cuda", "expected"),
    [(None, False, "cpu"), (None, True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_is_cuda_when_there_is_one_unless_told_otherwise(monkeypatch, name, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    if name is not None:
        monkeypatch.setenv(DEVICE_VARIABLE, name)
    assert choose_device().type == expected
    assert not torch.backends.cudnn.allow_tf32  # fp32 means fp32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("name", ["cuda", "tpu", ""])
def test_device_that_is_not_there_is_refused_with_a_remedy(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(DEVICE_VARIABLE, name)
    with pytest.raises(UserError, match=rf"{DEVICE_VARIABLE}.*cpu"):
        choose_device()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_products(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_description_names_threads_and_version():
    said = describe_device(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in said
    assert torch.__version__ in said


def test_freed_memory_is_kept_from_step_to_step():
    """In processes of their own: new pages that the kernel gives to a few training steps."""
    code = """
import resource, sys, torch
from torch import nn
from pipeline.device import keep_freed_memory

layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(6)]
network, images = nn.Sequential(*layers), torch.randn(128, 16, 32, 32)

def pages():
    for number in range(5):
        if number == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(images).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if sys.argv[1] == "keep" else True
print(pages() if kept else -1)
"""

    def pages(how: str) -> int:
        command = [sys.executable, "-c", code, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)

    before, after = pages("leave"), pages("keep")
    if after < 0:
        pytest.skip("no glibc")
    assert after < before / 4
