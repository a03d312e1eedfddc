"""The notebooks run from top to bottom: in a fresh clone, and beside a finished experiment."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sandbox
from builders import small_pair

from pipeline.models import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
NOTEBOOK = Path("examples/walkthrough.ipynb")
CLASSES = ("dark", "grey", "light")


@pytest.fixture
def clone(tmp_path) -> Path:
    """What Git has, and nothing that stages write but the metrics that are committed."""
    sandbox.make(tmp_path, changes={})
    listed = subprocess.run(
        ["git", "ls-files", "metrics"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def finish(folder: Path) -> None:
    """The files of an experiment that has finished there."""
    checkpoint.save(small_pair(classes=CLASSES, image_size=16), folder / "models/finetune")
    (folder / "plots/evaluate").mkdir(parents=True)
    rows = [f"{row},{row % 3},{row % 3},1,2,0{row % 2}1001,1,0.1" for row in range(9)]
    header = "image,label,predicted,correct,blocks,policy,full_correct,full_loss"
    (folder / "plots/evaluate/images.csv").write_text("\n".join([header, *rows]) + "\n")
    for stage in ("curriculum", "finetune"):
        curve = "epoch,validation_accuracy,validation_blocks_mean\n1,0.5,4\n2,0.9,3\n"
        (folder / f"plots/{stage}.csv").write_text(curve)
    (folder / "data/prepared").mkdir(parents=True)
    np.save(folder / "data/prepared/test_images.npy", np.zeros((2, 16, 16, 3), np.uint8))


def run(folder: Path, monkeypatch) -> str:
    """All that the notebook printed and drew, as JSON; its folder is the working directory, as usual."""
    nbformat = pytest.importorskip("nbformat", reason="nbconvert, of the group notebook")
    client = pytest.importorskip("nbclient", reason="nbconvert, of the group notebook")
    pytest.importorskip("ipykernel", reason="ipykernel, of the group notebook")
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str((folder / NOTEBOOK).parent)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return json.dumps([cell.get("outputs", []) for cell in notebook.cells])


def test_notebook_runs_in_a_fresh_clone_on_the_shipped_networks(clone, monkeypatch):
    output = run(clone, monkeypatch)
    assert "networks: pretrained/finetune" in output
    assert "bird 70" in output
    assert "ResNet-20" in output  # of the committed metrics
    assert "nothing is logged here yet" in output
    assert output.count("image/png") == 3  # no learning curves


def test_notebook_opens_a_finished_experiment(clone, monkeypatch):
    finish(clone)
    output = run(clone, monkeypatch)
    assert "networks: models/finetune" in output
    assert any(f"{name} " in output for name in CLASSES)
    assert output.count("image/png") == 4


def test_notebook_is_committed_without_outputs():
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
