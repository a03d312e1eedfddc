"""The machine: device, precision, seeds. Which device is used is no parameter: it reruns nothing."""

import ctypes
import hashlib
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.infra.errors import UserError

DEVICE_VARIABLE = "BLOCKDROP_DEVICE"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
WORKERS_VARIABLE = "BLOCKDROP_WORKERS"
MAX_WORKERS = 64


def choose_device() -> torch.device:
    """The device by BLOCKDROP_DEVICE: `auto` (the default; CUDA where there is one), `cpu`, `cuda`.

    Raises:
        UserError: another name, or CUDA asked for where there is none.
    """
    name = os.environ.get(DEVICE_VARIABLE, "auto")
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{DEVICE_VARIABLE}={name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{DEVICE_VARIABLE}=cuda, but PyTorch sees no CUDA device; unset it or use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32 means fp32 on every device; bf16 is the way to be faster
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


def loader_workers(device: torch.device) -> int:
    """Processes that decode images ahead of the device: BLOCKDROP_WORKERS, or one for each core.

    On a CPU none unless asked for: they would take the cores from the networks.

    Raises:
        UserError: BLOCKDROP_WORKERS is no number from 0 to 64.
    """
    text = os.environ.get(WORKERS_VARIABLE)
    if text is not None:
        if not (text.isascii() and text.isdigit() and int(text[:9]) <= MAX_WORKERS):
            raise UserError(f"{WORKERS_VARIABLE}={text[:20]!r}: set a number from 0 to {MAX_WORKERS}")
        return int(text)
    if device.type == "cpu":
        return 0
    return min(len(usable_cores()), MAX_WORKERS)


def describe_device(device: torch.device) -> str:
    """One line for logs and reports: what ran, on what, with which PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """What a time was measured on: hardware and versions."""
    on_cuda = device.type == "cuda"
    return {
        "device": describe_device(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The CPU's name, and its instructions for bfloat16 and wide vectors, where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    extras = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "")]
    return " ".join([facts.get("model name", platform.processor()), *extras])


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, for the next ones; return whether it does.

    glibc gives large blocks back to the kernel at once and fetches them anew, zeroed page by page, for
    every activation of every step: 8 % of a ResNet-32's training step on 2 CPU cores.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all((mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)))


def usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16.

    Without them PyTorch emulates bf16: on an AVX2 CPU it takes ten times as long as fp32. An x86 CPU has
    them with AVX512_BF16 or AMX, unless ONEDNN_MAX_CPU_ISA forbids oneDNN to use them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # on Arm this is the whole question
        return False
    on_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not on_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose numbers depend on the key alone, e.g. (seed, "finetune", epoch).

    Drawing on the CPU makes them the same on every device, and a key for each epoch lets a resumed
    run draw what the interrupted one would have drawn.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def seed_everything(*key: int | str) -> None:
    """Seed PyTorch's global generators (weight initialisation) by the key alone."""
    torch.manual_seed(generator(*key).initial_seed())


def random_states() -> dict[str, Any]:
    """The state of every global generator, as plain types and tensors.

    A training draws from keyed generators alone (`generator`). The global ones are saved all the same,
    for code or a library that will draw from them.
    """
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        # of the current device alone: others may belong to other processes, and have no free memory
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the global generators to what `random_states` returned (CUDA's where there is one)."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"][0])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call; on CUDA between two events, when its kernels have ended."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000
