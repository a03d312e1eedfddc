"""What all commands share: `--help` shows help and does nothing, errors end in one line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.infra.errors import UserError
from tools import __main__ as front_door
from tools import front
from tools.command import Parser, command
from tools.predict import paths_of

ROOT = Path(__file__).parents[2]
# modules that are no commands; tools.__main__ is all of them
LIBRARY = {"tools.command", "research.tables"}
COMMANDS = sorted(
    name
    for path in [*ROOT.glob("tools/[a-z]*.py"), *ROOT.glob("research/[a-z]*.py")]
    if (name := f"{path.parent.name}.{path.stem}") not in LIBRARY
)
REQUIRED = {  # arguments without which a command says that they are missing
    "research.ablation": ("finetune",),
    "research.budgets": ("a", "b"),
    "research.pooled": ("a",),
    "research.results": ("table",),
    "research.unlike": ("a",),
    "tools.import_checkpoint": ("a", "pretrain"),
    "tools.preset": ("a",),
    "tools.promote": ("a",),
    "tools.submit": ("gamma=5",),
}


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Start a command in an empty folder, where it makes nothing: status, output, complaints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def start(name: str, *words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        monkeypatch.delitem(sys.modules, name, raising=False)  # else runpy warns
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(name, run_name="__main__")
        assert list(tmp_path.iterdir()) == []
        return caught.value.code, *capsys.readouterr()

    return start


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_an_unknown_option_do_nothing(start, name):
    status, output, complaints = start(name, "--help")
    assert (status, complaints) == (0, "")
    assert output.startswith("usage: ")
    assert "--help" in output
    assert ".\n" in output  # the module's docstring
    status, output, complaints = start(name, *REQUIRED.get(name, ()), "--no-such")
    assert (status, output) == (2, "")
    assert complaints.startswith("error: ")
    assert "--no-such" in complaints
    assert complaints.endswith("`--help` says what there is\n")
    assert complaints.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("import_checkpoint", ("--", "", "pretrain"), "FILE is empty; `make import FILE=path"),
        ("import_checkpoint", ("--", "--help", "evaluate"), "invalid choice: 'evaluate'"),
        ("predict", ("--words=",), "no image is named; `make predict IMAGES="),
        ("preset", ("--", ""), "there is no preset ''"),
        ("preset", ("--", "--help"), "there is no preset '--help'"),
        ("ui", ("--port=x",), "invalid int value: 'x'"),
    ],
)
def test_bad_usage_is_one_line_with_the_remedy(start, name, words, message):
    status, output, complaints = start(f"tools.{name}", *words)
    line = complaints if status == 2 else f"{status}\n"
    assert output == ""
    assert message in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


def failing(error: BaseException) -> None:
    """A command that raises an error."""

    @command()
    def main(_: object) -> None:
        raise error

    main()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("it is wrong"), "error: it is wrong"),
        (FileNotFoundError(2, "No such file", "a.png"), "error: a.png: No such file; `dvc repro` makes"),
        (subprocess.CalledProcessError(1, ["dvc", "x"]), "error: `dvc x` failed (see above); mend that"),
        (subprocess.CalledProcessError(1, ["dvc"], stderr="a\nbad\n"), "error: `dvc` failed (bad)"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(monkeypatch, error, message):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as caught:
        failing(error)
    assert str(caught.value).startswith(message)


def test_ctrl_c_has_a_status_and_other_errors_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as caught:
        failing(KeyboardInterrupt())
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_description_may_hold_a_percent_sign(capsys):
    with pytest.raises(SystemExit):
        Parser(description="95 % of `x`\nsecond line").parse_args(["--help"])
    assert "95 % of `x`\nsecond line" in capsys.readouterr().out


# IMAGES of `make predict`


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ("", []),
        ("a.png", ["a.png"]),
        ("a b.png", ["a b.png"]),  # there is such a file
        ("a.png 'a b.png'", ["a.png", "a b.png"]),
        ("a.png a\\ b.png", ["a.png", "a b.png"]),
        ("it's.png", ["it's.png"]),
        ('a.png "it\'s.png"', ["a.png", "it's.png"]),
        ("--help b.png", ["--help", "b.png"]),
        ("`x` $(x) $3.png", ["`x`", "$(x)", "$3.png"]),
        ("one\ntwo.png", ["one\ntwo.png"]),
        ("?.png", ["a.png", "b.png"]),
        ("none*.png", ["none*.png"]),
        ("[x].png", ["[x].png"]),  # a file and no pattern
        ("x" * 300 + " a.png", ["x" * 300, "a.png"]),
    ],
)
def test_line_names_images(tmp_path, monkeypatch, words, paths):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "a b.png", "it's.png", "-rf.png", "one\ntwo.png", "[x].png"):
        Path(name).touch()
    assert paths_of(words) == [Path(name) for name in paths]


def test_quotation_mark_without_partner_is_named():
    with pytest.raises(UserError, match=r"IMAGES=it's\.png b\.png: a quotation mark has no partner"):
        paths_of("it's.png b.png")


# front


def test_front_leaves_the_figure_of_the_repository(tmp_path, monkeypatch):
    names = ("accuracy", "flops_mean", "blocks_mean", "num_blocks", "full_flops", "full_accuracy")
    params = {"gamma": "2", "seed": "0", "resnet.depth": "8", "data.source": "digits"}
    own = front.Experiment(run_id="r", name="one", params=params, metrics=dict.fromkeys(names, 0.5))
    monkeypatch.setattr(front, "sync", lambda root: None)
    monkeypatch.setattr(front, "experiments", lambda: ("1", [own]))
    monkeypatch.setattr(sys, "argv", ["front"])
    monkeypatch.chdir(tmp_path)
    front.main()
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert made == ["results/own/front.csv", "results/own/front.png", "results/own/front.svg"]
    ignored = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == made  # and so none is tracked


def test_next_step_needs_no_activated_environment():
    for name in ("preset", "import_checkpoint"):
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert "run `make repro`" in text
        assert "dvc repro" not in text


def test_one_name_reaches_every_command(capsys, monkeypatch):
    tools = {name for name in COMMANDS if name.startswith("tools.")}
    # what make alone calls: they set up, repair and check the checkout itself
    assert tools - set(front_door.COMMANDS.values()) == {
        "tools.environment", "tools.repair_dvc", "tools.schema",
    }  # fmt: skip
    for words in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["blockdrop", *words])
        with pytest.raises(SystemExit) as caught:
            front_door.main()
        assert caught.value.code == 0
        listed = capsys.readouterr().out
        assert all(f"\n    {name} " in listed for name in front_door.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["blockdrop", "predict", "--budget", "much"])
    with pytest.raises(SystemExit) as caught:
        front_door.main()
    assert caught.value.code == 2
    assert "--budget: invalid float value: 'much'" in capsys.readouterr().err


def test_completion_knows_commands_and_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["blockdrop", "completion", "bash"])
    front_door.main()
    script = capsys.readouterr().out
    words = 'COMP_WORDS=(blockdrop predict --bu) COMP_CWORD=2; _shtab_blockdrop; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{words}"], capture_output=True, text=True)
    assert done.stdout.split() == ["--budget"], done.stderr
