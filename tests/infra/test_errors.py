"""What the system refuses, in one line with a remedy; what is ours to mend, with its traceback."""

import errno
import os

import pytest
import torch

from pipeline.infra.errors import REMEDIES, UserError, explain, explain_memory
from stages.support import common


def test_system_errors_name_file_reason_and_remedy():
    for number, remedy in REMEDIES.items():
        said = explain(OSError(number, os.strerror(number), "models/finetune/model.json"))
        assert said.startswith(f"models/finetune/model.json: {os.strerror(number)}; {remedy}")
    assert explain(OSError("odd")) is None
    assert explain(ConnectionResetError(errno.ECONNRESET, "reset")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
        MemoryError(),
    ],
)
def test_memory_names_batch_size(error):
    said = explain_memory(error)
    assert "batch_size" in said
    assert "\n" not in said


def test_other_errors_are_not_memory():
    assert explain_memory(RuntimeError("shapes differ")) is None
    assert explain_memory(KeyError("out of memory")) is None


def run_stage(monkeypatch, error: BaseException) -> None:
    def main(_: object) -> None:
        raise error

    monkeypatch.setattr(common, "load_params", lambda: None)
    monkeypatch.setattr(common, "exit_on_sigterm", lambda: None)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    common.run(main)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("gamma: is bad"), 1, "error: gamma: is bad\n"),
        (OSError(errno.ENOSPC, "No space left on device", "models/x"), 1, "error: models/x: No space"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: out of memory (CUDA"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
    ],
)
def test_stages_end_in_one_line_and_their_status(error, code, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as raised:
        run_stage(monkeypatch, error)
    assert raised.value.code == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") <= 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("odd")])
def test_what_the_user_can_not_mend_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        run_stage(monkeypatch, error)


def test_folders_that_can_not_be_written_are_seen_at_once(tmp_path):
    common.require_writable(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as raised:
        common.require_writable(tmp_path / "models", tmp_path / "file" / "plots")
    assert "in the place of a folder" in explain(raised.value)


HOSTILE = "a\x1b]0;b\x07\nerror: forged\u202e\x9b"


@pytest.mark.parametrize(
    "error",
    [UserError(f"{HOSTILE}: is bad"), OSError(errno.ENOSPC, "No space left on device", HOSTILE)],
)
def test_name_of_a_file_forges_no_error(error, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, error)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert r"a\x1b]0;b\x07\nerror: forged" in line


def test_error_may_have_several_lines_of_its_own():
    assert str(UserError("a\n", "b")) == "a\\n\nb"
