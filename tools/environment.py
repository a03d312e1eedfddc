"""Make .venv from requirements.txt, unless it is usable and complete: `make setup`.

It uses the standard library alone and nothing newer than Python 3.6, so that every old Python can say
that it is too old. .venv's own Python runs it with `--check` first: status 0 when nothing is to be done,
3 when packages are to be installed, else 1 and a line on why .venv can't be used.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, NoReturn

VENV = Path(".venv")
PYTHON = VENV / "bin/python"
REQUIREMENTS = Path("requirements.txt")
INSTALLED = VENV / "requirements.txt"  # a copy of the one whose packages are installed
UNFINISHED = VENV / "being-set-up"  # exists from the beginning of a set-up to its end
CPU = "CPU"  # the variable that asks for a PyTorch without CUDA: CPU=1
CPU_ONLY = VENV / "cpu-only"  # exists where it has none
DRIVER = Path("/proc/driver/nvidia")
# where a user's own uv is looked for; .venv has one too, which does not read pip's configuration
OUTSIDE = os.pathsep.join(
    folder for folder in os.get_exec_path() if Path(folder).resolve() != (VENV / "bin").resolve()
)
PROGRAMS = ("pip", "dvc")  # the first that exists shows for which folder all were written
COMMAND = VENV / "bin/blockdrop"  # starts this checkout's code
BUILDER = "setuptools=="  # pyproject.toml's, at the version of requirements.txt
STALE = 3
NO_PYTHON = "has no Python that runs"
LACKING = "lacks packages of this requirements.txt"


class Parser(argparse.ArgumentParser):
    """As tools.command's, which old Pythons can't import: a usage error is one line, and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `--help` says what there is\n")


def versions() -> str:
    """The versions of Python that pyproject.toml allows: `>=3.11,<3.14`."""
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^requires-python = "(.*)"', text, re.MULTILINE)[0]


def is_supported() -> bool:
    """Whether pyproject.toml allows this Python's version."""
    low, high = (tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", versions()))
    return low <= sys.version_info[:2] < high


def written_for() -> "Path | None":
    """The environment whose Python the programs of .venv start; None where no program names one."""
    for program in (VENV / "bin" / name for name in PROGRAMS):
        if program.exists():
            with program.open("rb") as file:
                head = os.fsdecode(file.read(4096))
            match = re.search(r"""^(?:#!|'''exec' "?)(/.*)/bin/python""", head, re.MULTILINE)
            return Path(match.group(1)) if match else None
    return None


def fault() -> str:
    """Why .venv can't be used, found out by its own Python; empty when it can."""
    home = written_for()
    if not VENV.samefile(sys.prefix):
        return NO_PYTHON
    if not is_supported():
        return f"has Python {version()}, not {versions()}"
    if UNFINISHED.exists():
        return "was not set up to its end"
    if home is not None and not (home.exists() and VENV.samefile(home)):
        return f"was made in {home.parent}"
    return ""


def version() -> str:
    """Of this Python, as pyproject.toml writes versions."""
    return "{}.{}".format(*sys.version_info)


def check() -> int:
    """Print what is wrong with .venv, whose own Python calls this; returns the exit status."""
    why = fault()
    if why:
        print(why)
        return 1
    installed = INSTALLED.exists() and INSTALLED.read_bytes() == REQUIREMENTS.read_bytes()
    wanted = os.environ.get(CPU)  # whoever names no kind of build is content with either
    kind = wanted in (None, "", "1" if CPU_ONLY.exists() else "0")
    return 0 if installed and kind and (COMMAND.exists() or not has_command()) else STALE


def has_command() -> bool:
    """Whether requirements.txt brings what installs COMMAND."""
    return BUILDER in REQUIREMENTS.read_text(encoding="utf-8")


def run_check() -> "tuple[int, str]":
    """Let .venv's Python run `check`: its exit status, and what is wrong with .venv."""
    try:
        command = [str(PYTHON), "-m", "tools.environment", "--check"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return 1, NO_PYTHON
    why = os.fsdecode(done.stdout).strip() or NO_PYTHON
    return done.returncode, LACKING if done.returncode == STALE else why


def require_replaceable(why: str) -> None:
    """Refuse to replace what `make setup` did not make.

    Raises:
        SystemExit: .venv is a link to another folder's environment, or no environment.
    """
    if VENV.is_symlink():
        sys.exit(
            f"error: .venv is a link to {VENV.resolve()}, which {why} and is left as it is; `rm .venv`, "
            "and repeat: this folder gets an environment of its own"
        )
    marks = (UNFINISHED, VENV / "pyvenv.cfg")
    is_empty = VENV.is_dir() and not any(VENV.iterdir())
    if VENV.exists() and not is_empty and not any(path.exists() for path in marks):
        sys.exit("error: .venv is no environment of Python; move it away, and repeat")


def make_environment(why: str) -> None:
    """Make an environment without packages, in the place of one that can't be used.

    Raises:
        SystemExit: pyproject.toml does not allow this Python.
    """
    if not is_supported():
        sys.exit(
            f"error: {sys.executable} is Python {version()}, and this project takes {versions()}; name "
            "another one, as in `make setup PYTHON=python3.12`, and repeat"
        )
    if VENV.exists():
        print(f".venv {why}: it is made again", flush=True)
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        elif path != UNFINISHED:
            path.unlink()
    python = getattr(sys, "_base_executable", sys.executable)  # not .venv's own, which is deleted
    subprocess.run([python, "-m", "venv", str(VENV)], check=True)


def without_cuda(requirements: str) -> str:
    """The lines of a requirements.txt that a PyTorch without CUDA needs."""
    cuda = re.compile(r"(nvidia|cuda|triton)\b")
    return "".join(line for line in requirements.splitlines(True) if not cuda.match(line))


def require_kind() -> bool:
    """Whether PyTorch without CUDA is wanted: by `CPU=1`, or by an earlier set-up that had it.

    Raises:
        SystemExit: CPU is neither 0 nor 1.
    """
    wanted = os.environ.get(CPU) or ("1" if CPU_ONLY.exists() else "0")
    if wanted not in ("0", "1"):
        sys.exit(f"error: CPU is {wanted!r}; 1 leaves CUDA's libraries out, 0 installs them")
    return wanted == "1"


def install(cpu_only: bool) -> None:
    UNFINISHED.touch()
    if not (VENV / "bin/pip").exists():  # uv makes environments without it
        subprocess.run([str(PYTHON), "-m", "ensurepip", "--default-pip"], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    uv = shutil.which("uv", path=OUTSIDE)
    locked = REQUIREMENTS.read_text(encoding="utf-8")
    requirements = REQUIREMENTS
    if cpu_only:  # uv knows where builds without CUDA are; PyPI has none
        requirements = UNFINISHED
        requirements.write_text(without_cuda(locked), encoding="utf-8")
        if uv is None:
            subprocess.run([*pip, *re.findall("^uv==.*", locked, re.MULTILINE)], check=True)
            uv = str(VENV / "bin/uv")
    command = pip if uv is None else [uv, "pip", "install", "--quiet", "--python", str(PYTHON)]
    backend = ["--torch-backend", "cpu"] if cpu_only else []
    subprocess.run([*command, *backend, "-r", str(requirements)], check=True)
    if has_command():
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", "."], check=True)
    if cpu_only:
        CPU_ONLY.touch()
    elif CPU_ONLY.exists():
        CPU_ONLY.unlink()
    shutil.copyfile(str(REQUIREMENTS), str(INSTALLED))
    UNFINISHED.unlink()


def wait_for_others(file: IO[str]) -> None:
    """Lock a file, so that two `make` at a time do not set up the same .venv."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting: another make sets up .venv", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="see what is to be done, and do nothing")
    if parser.parse_args().check:
        return check()
    cpu_only = require_kind()
    with REQUIREMENTS.open() as lock:
        wait_for_others(lock)
        status, why = run_check()
        if status == 0:
            return 0
        require_replaceable(why)
        try:
            if status != STALE:
                make_environment(why)
            size = "about two minutes, " + ("2 GB" if cpu_only else "6 GB")
            print(f"setting up .venv ({size}) ...", flush=True)
            if not (cpu_only or DRIVER.exists()):
                print("(no NVIDIA GPU here: `make setup CPU=1` leaves CUDA's 4 GB out)", flush=True)
            install(cpu_only)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: `{' '.join(error.cmd)}` failed, see above; mend that, and repeat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
