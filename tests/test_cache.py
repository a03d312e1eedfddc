"""DVC's cache: full, damaged, or without what dvc.lock names. `make repro` notices and mends."""

import hashlib
import subprocess
import sys

import pytest
from repository_copy import TINY, Copy, environment, make_copy, ran

from tools.chaos.home import compile_shim, preloaded

pytestmark = pytest.mark.e2e
MEND = (sys.executable, "-m", "tools.mend")
LABELS = "data/prepared/test_labels.npy"


@pytest.fixture
def copy(tmp_path) -> Copy:
    made = make_copy(tmp_path / "copy", changes=TINY)
    made.run("dvc", "repro", "prepare")
    return made


def cached(copy: Copy, name: str):
    digest = hashlib.md5((copy.folder / name).read_bytes()).hexdigest()
    return copy.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def damage(path) -> bytes:
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    path.chmod(0o444)  # as DVC keeps what it trusts
    return whole


def test_damaged_object_is_removed_and_filled_from_the_work_tree(copy):
    path = cached(copy, LABELS)
    whole = damage(path)
    output = copy.run(*MEND)
    assert f"{path.relative_to(copy.folder)} was damaged and is removed" in output
    assert "data/prepared was in no cache and is put back into it" in output
    assert path.read_bytes() == whole
    assert ran(copy.run("dvc", "repro", "prepare")) == []
    assert copy.run(*MEND) == copy.run(*MEND, "--check") == ""


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
    output = copy.run(*MEND)
    assert "was damaged and is removed" in output
    assert "put back" not in output
    assert ran(copy.run("dvc", "repro", "prepare")) == ["prepare"]
    assert (copy.folder / LABELS).read_bytes() == path.read_bytes() == whole


def test_full_cache_is_noticed_and_filled_when_there_is_space(copy, tmp_path):
    (copy.folder / "params.yaml").write_text(
        (copy.folder / "params.yaml").read_text().replace("split_seed: 0", "split_seed: 1")
    )
    library = compile_shim(tmp_path)
    if library is None:
        pytest.skip("no C compiler, or no Linux")
    places = [".dvc/cache/files"]  # what DVC writes there first, to try links, it does not forgive
    full = preloaded(
        library, copy.folder, places, process="dvc repro", nth=6, fault="ENOSPC", later=True
    )
    done = subprocess.run(
        ["dvc", "repro", "prepare"], cwd=copy.folder, env=environment() | full, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    output = copy.run(*MEND, "--check", check=False)
    assert output.startswith("exit 1\nerror: data/prepared could not be written to DVC's cache")
    output = copy.run(*MEND)
    assert "put back" in output
    assert "damaged" not in output
    assert copy.run(*MEND, "--check") == ""
    assert ran(copy.run("dvc", "repro", "prepare")) == []
