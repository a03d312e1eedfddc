"""Make .venv from requirements.txt where it is not as it should be: `make setup`.

Standard library alone, and nothing newer than Python 3.6: it tells older ones that they are too old.
.venv's own Python runs it with `--check` first: status 0 when nothing is to be done, 3 when packages are
to be installed, else 1 and a line on why .venv can't be used.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

VENV = Path(".venv")
PYTHON = VENV / "bin/python"
REQUIREMENTS = Path("requirements.txt")
INSTALLED = VENV / "requirements.txt"  # a copy of those that were installed
UNDER_WAY = VENV / "being-set-up"  # there from the beginning of a set-up to its end
PROGRAMS = ("pip", "dvc")  # the first that is there shows for which folder all were written
STALE = 3
NO_PYTHON = "has no Python that runs"
LACKING = "has not the packages of this requirements.txt"


def versions() -> str:
    """The versions of Python that pyproject.toml allows: `>=3.11,<3.14`."""
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^requires-python = "(.*)"', text, re.MULTILINE)[0]


def is_supported() -> bool:
    """Whether this Python is one of them."""
    low, high = (tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", versions()))
    return low <= sys.version_info[:2] < high


def written_for() -> Path | None:
    """The environment whose Python the programs of .venv start; None where none of them says."""
    for program in (VENV / "bin" / name for name in PROGRAMS):
        if program.exists():
            with program.open("rb") as file:
                head = os.fsdecode(file.read(4096))
            found = re.search(r"""^(?:#!|'''exec' "?)(/.*)/bin/python""", head, re.MULTILINE)
            return Path(found.group(1)) if found else None
    return None


def fault() -> str:
    """Why .venv can't be used, as its own Python sees it; nothing when it can."""
    home = written_for()
    if not VENV.samefile(sys.prefix):
        return NO_PYTHON
    if not is_supported():
        return f"has Python {version()}, not {versions()}"
    if UNDER_WAY.exists():
        return "was not set up to its end"
    if home is not None and not (home.exists() and VENV.samefile(home)):
        return f"was made in {home.parent}"
    return ""


def version() -> str:
    """Of this Python, as pyproject.toml writes versions."""
    return "{}.{}".format(*sys.version_info)


def check() -> int:
    """Say what is wrong with .venv, to be called by its own Python; the exit status."""
    said = fault()
    if said:
        print(said)
        return 1
    installed = INSTALLED.exists() and INSTALLED.read_bytes() == REQUIREMENTS.read_bytes()
    return 0 if installed else STALE


def ask() -> tuple[int, str]:
    """Status and words of `check`, run by .venv's Python."""
    try:
        command = [str(PYTHON), "-m", "tools.environment", "--check"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return 1, NO_PYTHON
    why = os.fsdecode(done.stdout).strip() or NO_PYTHON
    return done.returncode, LACKING if done.returncode == STALE else why


def require_ours(why: str) -> None:
    """See that nobody loses what is in the place of .venv.

    Raises:
        SystemExit: it is a link to another folder's environment, or no environment.
    """
    if VENV.is_symlink():
        sys.exit(
            f"error: .venv is a link to {VENV.resolve()}, which {why} and is left as it is; `rm .venv`, "
            "and repeat: this folder gets an environment of its own"
        )
    whose = (UNDER_WAY, VENV / "pyvenv.cfg")
    is_empty = VENV.is_dir() and not any(VENV.iterdir())
    if VENV.exists() and not is_empty and not any(path.exists() for path in whose):
        sys.exit("error: .venv is no environment of Python; move it away, and repeat")


def make_anew(why: str) -> None:
    """An environment without packages, in the place of one that can't be used.

    Raises:
        SystemExit: the project does not take this Python.
    """
    if not is_supported():
        sys.exit(
            f"error: {sys.executable} is Python {version()}, and this project takes {versions()}; name "
            "another one, as in `make setup PYTHON=python3.12`, and repeat"
        )
    if VENV.exists():
        print(f".venv {why}: it is made anew", flush=True)
    VENV.mkdir(exist_ok=True)
    UNDER_WAY.touch()
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        elif path != UNDER_WAY:
            path.unlink()
    python = getattr(sys, "_base_executable", sys.executable)  # .venv's own, where it runs this, is gone
    subprocess.run([python, "-m", "venv", str(VENV)], check=True)


def install() -> None:
    """Bring in what requirements.txt lists."""
    UNDER_WAY.touch()
    if not (VENV / "bin/pip").exists():  # uv makes environments without it
        subprocess.run([str(PYTHON), "-m", "ensurepip", "--default-pip"], check=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-r", str(REQUIREMENTS)], check=True)
    shutil.copyfile(str(REQUIREMENTS), str(INSTALLED))
    UNDER_WAY.unlink()


def wait_for_others(file: IO[str]) -> None:
    """Lock a file, so that two `make` at once do not set up the same .venv."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting: another make sets up .venv", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass


def main() -> int:
    """Check, or set up; the exit status."""
    if sys.argv[1:] == ["--check"]:
        return check()
    with REQUIREMENTS.open() as held:
        wait_for_others(held)
        status, why = ask()
        if status == 0:
            return 0
        require_ours(why)
        try:
            if status != STALE:
                make_anew(why)
            print("setting up .venv (about two minutes, 6 GB) ...", flush=True)
            install()
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: `{' '.join(error.cmd)}` failed, see above; mend that, and repeat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
