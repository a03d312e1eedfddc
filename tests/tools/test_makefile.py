"""`make`: an environment that is as it should be, and names that reach the tools as they were typed."""

import ast
import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools import environment

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
case "$*" in *tools.environment*) exit 0;; esac
exec '{python}' -c 'import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))' "$@"
"""
HOSTILE = [
    "a b.png",
    'it\'s "hi".png',
    "`touch ran`",
    "$(touch ran) $(shell touch ran) ${shell touch ran}",
    "x; touch ran && touch ran | tee ran > ran #",
    "one\ntouch ran",
    "cost$3 $$ $PATH back\\slash %s \u00fcber \u732b.png",
    "--help",
    "*",
]


def project(folder: Path, *, requirements: str = "") -> Path:
    """A folder with the Makefile and what `make setup` needs, which takes seconds and no network."""
    packages = ("pipeline/__init__.py", "tools/__init__.py", "tools/environment.py")
    for name in ("Makefile", "pyproject.toml", *packages):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text(requirements)
    return folder


@functools.cache
def python_alone() -> str:
    """A folder with this Python and no other program of its environment, such as uv."""
    folder = tempfile.mkdtemp(prefix="python-")
    atexit.register(shutil.rmtree, folder)
    Path(folder, "python3").symlink_to(sys._base_executable)
    return folder


def make(
    folder: Path, *words: str, before: Path = ROOT / "tests/none", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run make, with nothing of the environment that the tests run in, and `before` first in PATH."""
    outside = {
        name: text
        for name, text in os.environ.items()
        if name in ("HOME", "LANG", "LC_ALL", "TMPDIR") or name.startswith("PYENV")
    }
    path = f"{before}{os.pathsep}{python_alone()}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        ["make", *words],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env=outside | {"PATH": path, "PIP_NO_INDEX": "1"} | environment,
    )  # fmt: skip


# .venv


@pytest.fixture(scope="module")
def set_up(tmp_path_factory) -> Path:
    """A project with an environment that is as it should be; not to be changed."""
    folder = project(tmp_path_factory.mktemp("made") / "project")
    done = make(folder, "setup")
    assert done.returncode == 0, done.stderr
    assert "setting up .venv" in done.stdout
    return folder


@pytest.fixture
def copy(set_up, tmp_path) -> Path:
    """A copy of it in another folder."""
    shutil.copytree(set_up, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("own") / "project"


@pytest.fixture
def installed(own) -> Path:
    """One that a test may change: made whole again here."""
    assert make(project(own), "setup").returncode == 0
    return own


def error_line(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one line of error, of a make that failed and did nothing."""
    assert done.returncode == status, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "setting up" not in done.stdout
    return lines[0]


def is_whole(folder: Path) -> bool:
    """Whether another `make setup` has nothing to do, and programs run."""
    again = make(folder, "setup")
    version = subprocess.run([folder / ".venv/bin/pip", "--version"], capture_output=True, text=True)
    assert str(folder) in version.stdout, version
    return (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_environment_that_is_as_it_should_be_is_left(set_up):
    before = {path: path.lstat().st_mtime_ns for path in (set_up / ".venv/bin").iterdir()}
    assert is_whole(set_up)
    assert {path: path.lstat().st_mtime_ns for path in (set_up / ".venv/bin").iterdir()} == before
    done = make(set_up, "setup", PYTHON="no-such-python")  # which is not asked for
    assert done.returncode == 0


def test_environment_without_the_command_is_to_be_completed(installed, monkeypatch):
    (installed / "requirements.txt").write_text("setuptools==80\n")
    (installed / ".venv/requirements.txt").write_text("setuptools==80\n")
    monkeypatch.chdir(installed)
    assert environment.run_check() == (environment.STALE, environment.LACKING)
    (installed / ".venv/bin/blockdrop").touch()
    assert environment.run_check()[0] == 0


def test_set_up_without_cuda(own, installed, tmp_path):
    """With a program in uv's place, since a test has no network."""
    cuda = "cuda-toolkit==13 ; sys_platform == 'linux'\nnvidia-cudnn-cu13==9\ntriton==3\n"
    lock = f"{cuda}numpy==2\ntorch==2.14.0\n"
    (installed / "requirements.txt").write_text(lock)
    uv = tmp_path / "uv"
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/words\ncat .venv/being-set-up >> {tmp_path}/lines\n'
    )
    uv.chmod(0o755)

    def given(*words: str) -> subprocess.CompletedProcess[str]:
        return make(installed, *words, before=tmp_path)

    assert given("setup", "CPU=1").returncode == 0
    assert "--torch-backend cpu -r .venv/being-set-up" in (tmp_path / "words").read_text()
    assert (tmp_path / "lines").read_text() == "numpy==2\ntorch==2.14.0\n"
    (tmp_path / "words").unlink()
    for words in (["setup"], ["setup", "CPU=1"]):  # it stays as it is
        assert (given(*words).returncode, given(*words).stdout) == (0, "")
    (installed / "requirements.txt").write_text(lock.replace("numpy==2", "numpy==3"))
    assert given("setup").returncode == 0  # and is of that kind after a change, too
    assert "--torch-backend cpu" in (tmp_path / "words").read_text()
    (tmp_path / "words").unlink()
    assert given("setup", "CPU=0").returncode == 0
    assert (tmp_path / "words").read_text().strip().endswith("-r requirements.txt")
    assert "torch-backend" not in (tmp_path / "words").read_text()
    assert "CPU is 'yes'; 1 leaves" in error_line(given("setup", "CPU=yes"))


@pytest.mark.parametrize("original_stays", [True, False])
def test_copied_or_moved_environment_is_made_anew(set_up, copy, original_stays):
    if not original_stays:
        copy = copy.rename(copy.with_name("moved on"))
        script = copy / ".venv/bin/pip"
        script.write_text(script.read_text().replace(str(set_up), str(copy.with_name("gone"))))
    done = make(copy, "setup")
    assert done.returncode == 0, done.stderr
    assert ".venv was made in /" in done.stdout
    assert is_whole(copy)
    assert is_whole(set_up)


def test_python_that_is_gone_is_replaced(installed):
    (installed / ".venv/bin/python").unlink()
    (installed / ".venv/bin/python").symlink_to("/nowhere/python3.11")
    assert ".venv has no Python that runs: it is made again" in make(installed, "setup").stdout
    assert is_whole(installed)


def test_set_up_that_was_killed_half_way_is_repeated(installed):
    (installed / "requirements.txt").write_text("no-such-package-at-all\n")
    done = make(installed, "setup")
    assert done.returncode == 2
    assert "error: `.venv/bin/python -m pip install" in done.stderr
    assert "failed, see above; mend that, and repeat" in done.stderr
    (installed / "requirements.txt").write_text("")
    assert ".venv was not set up to its end: it is made again" in make(installed, "setup").stdout
    assert is_whole(installed)


def test_other_requirements_are_installed_beside_what_is_there(installed):
    (installed / ".venv/mine").touch()
    (installed / "requirements.txt").write_text("# another one\n")
    done = make(installed, "setup", PYTHON="no-such-python-3", PATH="/usr/bin:/bin")
    assert "no-such-python-3" in error_line(done)
    assert "setting up" in make(installed, "setup").stdout
    assert (installed / ".venv/mine").exists()
    assert is_whole(installed)


def other_versions(folder: Path) -> None:
    """Let the project take another Python than the one that runs."""
    text = (folder / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(
        re.sub('requires-python = ".*"', 'requires-python = ">=3.97,<3.99"', text)
    )


def test_unsupported_python_is_refused_and_nothing_is_made(tmp_path):
    folder = project(tmp_path / "new")
    there_is_none = "error: there is no python3.99; name a Python, as in `make setup PYTHON=python3.12`"
    assert error_line(make(folder, "setup", "PYTHON=python3.99")) == there_is_none
    other_versions(folder)
    message = error_line(make(folder, "setup"))
    assert f"is Python {environment.version()}, and this project takes >=3.97,<3.99" in message
    assert "`make setup PYTHON=python3.12`" in message
    assert not (folder / ".venv").exists()


def test_environment_of_an_unsupported_python_is_not_used(installed, monkeypatch):
    other_versions(installed)
    error_line(make(installed, "setup"))
    assert (installed / ".venv/bin/pip").exists()  # there is no other Python to replace it by
    monkeypatch.chdir(installed)
    assert environment.run_check() == (1, f"has Python {environment.version()}, not >=3.97,<3.99")


def test_link_to_a_whole_environment_is_used(set_up, tmp_path):
    folder = project(tmp_path / "linked")
    (folder / ".venv").symlink_to(set_up / ".venv")
    done = make(folder, "setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("fault", ["stale", "copied", "dangling"])
def test_what_a_link_leads_to_is_left_as_it_is(set_up, copy, tmp_path, fault):
    folder = project(tmp_path / "linked", requirements="# more\n" if fault == "stale" else "")
    linked = copy if fault == "copied" else set_up
    (folder / ".venv").symlink_to(tmp_path / "nowhere" if fault == "dangling" else linked / ".venv")
    before = sorted(path.name for path in (linked / ".venv").iterdir())
    message = error_line(make(folder, "setup"))
    assert "error: .venv is a link to" in message
    assert "`rm .venv`" in message
    assert sorted(path.name for path in (linked / ".venv").iterdir()) == before


@pytest.mark.parametrize("in_place", ["folder", "file"])
def test_what_is_no_environment_is_not_removed(tmp_path, in_place):
    folder = project(tmp_path / "new")
    mine = folder / ".venv" / "thesis.tex" if in_place == "folder" else folder / ".venv"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert ".venv is no environment of Python; move it away" in error_line(make(folder, "setup"))
    assert mine.read_text() == "mine"


def test_two_makes_at_once_set_up_once(tmp_path):
    folder = project(tmp_path / "new")
    both = [
        subprocess.Popen(["make", "setup", f"PYTHON={sys.executable}"], cwd=folder, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]  # fmt: skip
    message = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], message
    assert "".join(message).count("setting up") == 1
    assert is_whole(folder)


@pytest.mark.parametrize("file", ["tools/environment.py", "tools/__init__.py", "pipeline/__init__.py"])
def test_old_python_can_say_that_it_is_too_old(file):
    tree = ast.parse((ROOT / file).read_text(), feature_version=(3, 6))
    for node in ast.walk(tree):  # `Path | None` and `tuple[int, str]` raise there, unless quoted
        if isinstance(node, ast.FunctionDef):
            annotations = [node.returns, *(argument.annotation for argument in node.args.args)]
            for annotation in filter(None, annotations):
                assert not isinstance(annotation, ast.BinOp), ast.unparse(annotation)
                assert not ast.unparse(annotation).startswith(("tuple[", "list[", "dict["))


@pytest.mark.parametrize(
    ("head", "home"),
    [
        ("#!{}/bin/python\n", "/a/b c/.venv"),
        ("#!{}/bin/python3.11\n", "/usr/bin/python-things/.venv"),
        ("#!/bin/sh\n'''exec' \"{}/bin/python\" \"$0\" \"$@\"\n' '''\n", "/a/b c/.venv"),
        ("#!/bin/sh\n'''exec' {}/bin/python3 \"$0\" \"$@\"\n' '''\n", "/usr/bin/python-things/.venv"),
    ],
)
def test_programs_say_for_which_folder_they_were_written(tmp_path, monkeypatch, head, home):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    assert environment.written_for() is None
    (tmp_path / ".venv/bin/pip").write_text(head.format(home) + "import sys\n")
    assert environment.written_for() == Path(home)


# names


@pytest.fixture
def stubbed(tmp_path) -> Path:
    """A project, in a folder of a hostile name, whose Python prints its arguments and environment."""
    folder = project(tmp_path / "my $3 `touch ran` 'project'")
    program = folder / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text(STUB.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def handed_over(folder: Path, *words: str, **variables: str) -> list[str]:
    """The arguments of the tool that make started, when nothing else has happened."""
    before = sorted(folder.rglob("*"))
    done = make(folder, *words, **variables)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert sorted(folder.rglob("*")) == before
    arguments, environment = json.loads(done.stdout.splitlines()[-1])
    assert environment["PATH"].startswith(f"{folder}/.venv/bin:")
    return arguments


@pytest.mark.parametrize(
    ("name", "by_environment"),
    [*((name, False) for name in HOSTILE), *((name, True) for name in HOSTILE[1:4])],
)
def test_names_reach_the_tools_as_they_were_typed(stubbed, name, by_environment):
    def given(target: str, **variables: str) -> list[str]:
        if by_environment:
            return handed_over(stubbed, target, **variables)
        return handed_over(stubbed, target, *(f"{key}={text}" for key, text in variables.items()))

    assert given("preset", NAME=name) == ["-m", "tools.preset", "--", name]
    assert given("preset-show", NAME=name) == ["-m", "tools.preset", "--show", "--", name]
    assert given("promote", NAME=name) == ["-m", "tools.promote", "--", name]
    assert given("predict", IMAGES=name) == ["-m", "tools.predict", f"--words={name}"]
    imported = given("import", FILE=name, STAGE=name)
    assert imported == ["-m", "tools.import_checkpoint", "--", name, name]
    if not by_environment:
        demo = given("demo", MODEL=name, PORT=name)
        assert demo == ["-m", "tools.demo", f"--model={name}", f"--port={name}"]
        assert given("predict", MODEL=name)[2:] == [f"--model={name}", "--words="]
        address = given("ui", HOST=name, PORT=name)
        assert address == ["-m", "tools.ui", f"--host={name}", f"--port={name}"]


def test_ui_is_opened_to_others_on_the_command_line_alone(stubbed):
    """Some shells and services set HOST and PORT."""
    expected = ["-m", "tools.ui", "--host=127.0.0.1"]
    assert handed_over(stubbed, "ui", HOST="0.0.0.0", PORT="80") == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_python_of_any_name_is_a_program_and_no_command(tmp_path, name):
    folder = project(tmp_path / "new")
    done = make(folder, "setup", f"PYTHON={name}")
    assert done.returncode == 2
    assert not (folder / "ran").exists()
    assert "error: there is no " in done.stderr


def test_recipes_hold_no_name_that_users_give():
    """Make puts `$(NAME)` into the command as it is."""
    text = (ROOT / "Makefile").read_text()
    names = re.search(r"^NAMED := (.*)", text, re.MULTILINE)[1].split()
    recipes = "\n".join(line for line in text.splitlines() if line.startswith("\t"))
    assert set(names) == {
        "BUDGET", "CPU", "FILE", "HOST", "IMAGES", "MODEL", "NAME", "PORT", "PYTHON", "SEEDS", "SET",
        "STAGE", "STUDY", "TO", "TRIALS",
    }  # fmt: skip
    assert not re.search(rf"\$[({{]({'|'.join(names)})[)}}]", recipes)
    for name in re.findall(r"\$\$(\w+)", recipes):
        assert name in names
        assert f'"$${name}"' in recipes or f'="$${name}"' in recipes


def test_help_lists_every_target():
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  ([a-z0-9-]+) - \w", done.stdout, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert sorted(listed) == sorted(phony[1].split())


def test_named_test_files_exist():
    names = re.findall(r"tests/[\w/.]+", (ROOT / "Makefile").read_text())
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []
