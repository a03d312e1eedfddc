"""The hook of tests/helpers/serial.py, in a pytest session with two workers."""

import os
import subprocess
import sys
from pathlib import Path

WAITS = """
import pathlib, time, pytest

def test_until_the_other_worker_is_at_it():
    deadline = time.monotonic() + 60
    while not pathlib.Path("at it").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

@pytest.mark.serial
def test_measures():
    pathlib.Path("measuring").touch()
    time.sleep(0.5)
    pathlib.Path("measuring").unlink()
"""
WORKS = """
import pathlib, time, pytest

@pytest.mark.parametrize("number", range(60))
def test_works(number):
    pathlib.Path("at it").touch()
    for _ in range(5):
        assert not pathlib.Path("measuring").exists()
        time.sleep(0.01)
"""


def test_marked_test_has_no_other_beside_it(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = serial")
    (tmp_path / "test_measures.py").write_text(WAITS)
    (tmp_path / "test_works.py").write_text(WORKS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "serial", "-n", "2", "--dist", "loadfile"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent / "helpers")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
