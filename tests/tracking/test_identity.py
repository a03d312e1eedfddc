"""The preset that an experiment is of, whatever was swept, and its name where DVC gives none."""

import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.tracking.dvc_results import work_tree
from pipeline.tracking.identity import as_texts, experiment_name, local_preset, preset_of
from tools import preset

ROOT = Path(__file__).parents[2]


def params_of(name: str, **changes: object) -> dict[str, str]:
    values = preset.load(name, ROOT / "presets").flat()
    return as_texts({**values, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
def test_every_preset_is_known_by_its_parameters(name):
    assert preset_of(params_of(name), work_tree(str(ROOT))) == (name, [])


def test_swept_parameters_leave_the_preset_and_others_do_not():
    files = work_tree(str(ROOT))
    swept = params_of("cifar10_demo", gamma=7, seed=3, curriculum__gamma=7)
    assert preset_of(swept, files) == ("cifar10_demo", ["curriculum.gamma=7", "gamma=7", "seed=3"])
    assert preset_of(params_of("digits", finetune__lr=0.5), files) is None
    assert preset_of({}, files) is None
    whole = as_texts(dict(config.flatten(config.read(ROOT / "params.yaml"))))  # as `make sync` reads it
    assert preset_of(whole, files) == ("digits", [])


def test_presets_that_are_missing_or_half_written_name_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_preset({"gamma": "1"}) == ""
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/digits.yaml").write_text("gamma: 1\n")
    (tmp_path / "presets/a_half.yaml").write_text("gamma: [\n")
    (tmp_path / "presets/bytes.yaml").write_bytes(b"\xff")
    assert local_preset({"gamma": "1"}) == "digits"


def test_name_holds_preset_commit_and_what_was_swept(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    for name, values in {"digits": {"gamma": 1, "depth": 8}, "deep": {"depth": 110}}.items():
        (tmp_path / f"presets/{name}.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "params.yaml").write_text("gamma: 1\ndepth: 8\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", "-b", "trunk"], check=True)
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    here = f"trunk-{commit.stdout.strip()}"
    assert experiment_name({"gamma": "1", "depth": "110"}) == f"deep {here}"
    assert experiment_name({"gamma": "5", "depth": "8"}) == f"digits {here} gamma=5"
    assert experiment_name({"gamma": "1", "depth": "20"}) == f"{here} depth=20"
    monkeypatch.setenv("DVC_EXP_NAME", "tawny-quop")
    assert experiment_name({"gamma": "1", "depth": "110"}) == "tawny-quop"
