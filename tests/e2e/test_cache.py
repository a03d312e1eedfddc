"""DVC's cache: full, damaged, or without what dvc.lock names. `make repro` notices and mends."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos.write_faults import compile_library, preloaded
from repository_copy import TINY, Copy, environment, make_copy, ran

pytestmark = pytest.mark.e2e
REPAIR = (sys.executable, "-m", "tools.repair_dvc")
LABELS = "data/prepared/test_labels.npy"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    """One for all tests: each leaves the cache whole."""
    made = make_copy(tmp_path_factory.mktemp("copy"), changes=TINY)
    made.run("dvc", "repro", "prepare")
    return made


def cached(copy: Copy, name: str) -> Path:
    digest = hashlib.md5((copy.folder / name).read_bytes()).hexdigest()
    return copy.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def flipped(whole: bytes) -> bytes:
    return whole[:-1] + bytes([whole[-1] ^ 1])


def shortened(whole: bytes) -> bytes:
    return whole[:-1]


def damage(path: Path, change: Callable[[bytes], bytes] = flipped) -> bytes:
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(change(whole))
    path.chmod(0o444)  # as DVC keeps what it trusts
    return whole


@pytest.mark.parametrize(("kind", "change"), [("file", flipped), ("folder", shortened)])
def test_damaged_object_is_removed_and_filled_from_the_work_tree(copy, kind, change):
    path = cached(copy, LABELS)
    if kind == "folder":  # the list of its files
        (path,) = (copy.folder / ".dvc/cache/files/md5").glob("*/*.dir")
    whole = damage(path, change)
    output = copy.run(*REPAIR)
    assert f"{path.relative_to(copy.folder)} was damaged and is removed" in output
    assert "data/prepared was missing from the cache and is copied back" in output
    assert path.read_bytes() == whole
    assert ran(copy.run("dvc", "repro", "prepare")) == []
    assert "error" not in copy.run(*REPAIR, "--check")


def test_damaged_object_that_was_restored_is_made_anew(copy):
    """To force the stage, as one would, mends nothing."""
    path = cached(copy, LABELS)
    whole = damage(path)
    copy.run("dvc", "repro", "--force", "prepare")
    assert path.read_bytes() != whole
    (copy.folder / LABELS).unlink()
    copy.run("dvc", "checkout", "prepare")
    assert (copy.folder / LABELS).read_bytes() == path.read_bytes() != whole
    assert "up to date" in copy.run("dvc", "status", "prepare")
    output = copy.run(*REPAIR)
    assert "was damaged and is removed" in output
    assert "copied back" not in output
    assert ran(copy.run("dvc", "repro", "prepare")) == ["prepare"]
    assert (copy.folder / LABELS).read_bytes() == path.read_bytes() == whole


def on_full_disk(copy: Copy, library: Path, nth: int, *command: str) -> str:
    """Output of a command whose n-th write into the cache, and all later ones, find no space."""
    places = [".dvc/cache/files"]
    program = " ".join(command[-2:])
    full = preloaded(library, copy.folder, places, process=program, nth=nth, fault="ENOSPC", later=True)
    done = subprocess.run(
        command, cwd=copy.folder, env=environment() | full, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return f"exit {done.returncode}\n{done.stdout}"


def test_full_cache_is_noticed_and_filled_when_there_is_space(copy, tmp_path):
    (copy.folder / "params.yaml").write_text(
        (copy.folder / "params.yaml").read_text().replace("split_seed: 0", "split_seed: 1")
    )
    library = compile_library(tmp_path)
    if library is None:
        pytest.skip("no C compiler, or no Linux")
    # what DVC writes there first, to try links, it does not forgive
    output = on_full_disk(copy, library, 6, "dvc", "repro", "prepare")
    assert output.startswith("exit 0"), output
    refused = "error: data/prepared could not be written to DVC's cache"
    output = copy.run(*REPAIR, "--check", check=False)
    assert output.startswith(f"exit 1\n{refused}")
    for nth in (1, 6):  # repeated too early: a stage that ran now would begin with removing its outs
        output = on_full_disk(copy, library, nth, *REPAIR)
        assert output.startswith("exit 1\n"), output
        assert refused in output
    output = copy.run(*REPAIR)
    assert "copied back" in output
    assert "damaged" not in output
    assert "error" not in copy.run(*REPAIR, "--check")
    assert ran(copy.run("dvc", "repro", "prepare")) == []


def test_bytes_that_a_disk_lost_are_found_after_touching_all_objects(copy):
    """DVC remembers digests by size and time of writing; what nothing wrote to is not read again."""
    path = cached(copy, LABELS)
    times = path.stat()
    whole = damage(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copy.run(*REPAIR) == ""
    copy.run("find", ".dvc/cache/files", "-type", "f", "-exec", "touch", "{}", "+")
    assert "was damaged and is removed" in copy.run(*REPAIR)
    assert path.read_bytes() == whole
