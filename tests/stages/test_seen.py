"""What a stage reads of a folder is what DVC records of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from archives import fill

from pipeline.infra.errors import UserError
from pipeline.sources.class_folders import scan
from stages.support.common import require_seen
from stages.support.training import imported_path


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True, cwd=folder)
    fill(folder / "data/images", count=2)
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch) -> Path:
    """A DVC project with a folder of images."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "project"))
    return tmp_path / "project"


def files() -> list[Path]:
    return [path for images in scan(Path("data/images")).splits.values() for path, _ in images]


def refusal(folder: str = "data/images") -> str:
    with pytest.raises(UserError) as caught:
        require_seen(Path(folder), files())
    return str(caught.value)


def test_images_that_dvc_sees_are_taken(project):
    Path(".dvcignore").write_text("__pycache__\n/other\n")
    require_seen(Path("data/images"), files())


@pytest.mark.parametrize(
    ("place", "pattern", "hidden"),
    [
        (".", "/data/images", "data/images"),
        (".", "data", "data/images"),
        (".", "*.png", "data/images/cat/0.png"),
        ("data/images", "cat/", "data/images/cat/0.png"),
    ],
)
def test_images_that_dvc_would_not_see_are_refused(project, place, pattern, hidden):
    Path(place, ".dvcignore").write_text(f"{pattern}\n")
    message = refusal()
    assert f"'{project / hidden}' is hidden from DVC" in message
    assert f"{Path(place, '.dvcignore')}:1:{pattern}" in message
    assert "another folder, or change that pattern" in message


def test_class_behind_a_link_is_refused_and_a_linked_folder_not(project):
    Path("data/images/cat").rename("elsewhere")
    Path("data/images/cat").symlink_to(project / "elsewhere")
    assert "data/images/cat is a link to a folder, which DVC does not follow" in refusal()
    Path("data/images/cat").unlink()
    Path("elsewhere").rename("data/images/cat")
    Path("data/images").rename("whole")
    Path("data/images").symlink_to(project / "whole")
    require_seen(Path("data/images"), files())


@pytest.mark.parametrize("pattern", ["/import/mine", "*.json"])
def test_import_that_dvc_would_not_see_is_refused(project, pattern):
    Path("import/mine").mkdir(parents=True)
    Path("import/mine/model.json").write_text("{}")
    assert imported_path("import/mine") == Path("import/mine")
    Path("import/x.json").write_text("{}")
    Path(".dvcignore").write_text(f"{pattern}\n")
    with pytest.raises(UserError, match=r"import/mine.* is hidden from DVC \('.dvcignore:1:"):
        imported_path("import/mine")
    assert imported_path("import/x.json") == Path("import/x.json")
