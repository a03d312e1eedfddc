"""Every stage on a tree of real images that is streamed, with a small bottleneck network."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from image_tree import write_tree
from repository_copy import changed, make_copy, ran

from pipeline.config import load
from pipeline.models import checkpoint
from stages import (
    baseline,
    benchmark,
    check,
    curriculum,
    evaluate,
    finetune,
    policy_pretrain,
    prepare,
    pretrain,
    prune,
    report,
    sole,
    static,
)

pytestmark = pytest.mark.e2e
SMALL = {
    "data": {
        "source": "imagefolder_stream", "image_size": 64, "validation_fraction": 0.25,
        "test_fraction": None,
    },
    "augmentation": {"crop_padding": 0, "flip": True},
    "resnet": {"family": "imagenet", "depth": 26, "width": 4},
    "policy_net": {"family": "imagenet", "depth": 10, "width": 8, "input_size": 32},
    "pretrain": {"epochs": 2, "batch_size": 16},
    "prune": {"ratio": 0.5, "scope": "sensitivity", "epochs": 1, "batch_size": 16},
    "curriculum": {"epochs": 5, "batch_size": 16},
    "finetune": {"epochs": 2, "batch_size": 16},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {"batch_sizes": [1, 8], "rounds": 5, "seconds": 60, "sole_depths": [14]},
    "sole": {"depths": [14]},
    "static": {"rules": ["distribute"], "num_kept": [5]},
}  # fmt: skip


def put_tree(project: Path, elsewhere: Path) -> None:
    (project / "data").mkdir(exist_ok=True)
    (project / "data/images").symlink_to(write_tree(elsewhere, train=16, test=6))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with its params.yaml and a link to the images."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(SMALL), sort_keys=False))
    put_tree(tmp_path, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    return tmp_path


def metrics(name: str) -> dict:
    return json.loads(Path(f"metrics/{name}.json").read_text())


def test_every_stage_runs_on_a_streamed_tree(project, monkeypatch):
    """In one process: importing PyTorch for each would take most of the time."""
    params = load(project / "params.yaml")
    check.main()
    for stage in (prepare, pretrain, prune, policy_pretrain, curriculum, finetune, evaluate):
        stage.main(params)
    sole.main(params, depth=14)
    static.main(params, rule="distribute", num_kept=5)
    for stage in (baseline, benchmark, report):
        stage.main(params)
    evaluated, full = metrics("evaluate"), metrics("baseline")["baseline"]
    assert evaluated["num_blocks"] == 8
    assert evaluated["full_flops"] == full["flops"]
    assert evaluated["full_accuracy"] == full["accuracy"]
    pruned = metrics("baseline")["pruned"]["every_block"]
    assert evaluated["flops_saved_by_pruning"] == pytest.approx(1 - pruned["flops"] / full["flops"])
    assert 0 < evaluated["flops_saved_by_pruning"] < 1
    own = checkpoint.load(Path("models/finetune"))
    assert own.resnet.is_pruned
    assert own.resnet.family == "imagenet"
    assert own.image_size == 64
    measured = json.loads(Path("plots/benchmark/benchmark.json").read_text())
    assert "CIFAR's ResNets alone" in measured["left_out"]["native fp32"]
    timed = [row for row in measured["times"] if row["kind"] == "blockdrop"]
    assert {row["candidate"] for row in timed} == {"masked", "gather", "grouped"}
    assert all(row["agreement"]["agrees"] for row in timed)
    assert "ResNet-26" in Path("report/report.md").read_text()
    monkeypatch.setenv("BLOCKDROP_WORKERS", "2")
    before = Path("models/pretrain/model.safetensors").read_bytes()
    shutil.rmtree(".resume")
    pretrain.main(params)
    assert Path("models/pretrain/model.safetensors").read_bytes() == before


def test_dvc_keeps_lists_of_the_images_and_not_the_images(tmp_path):
    copy = make_copy(tmp_path / "copy", changes=SMALL)
    put_tree(copy.folder, tmp_path / "elsewhere")
    assert ran(copy.run("dvc", "repro", "prepare")) == ["check", "prepare"]
    lists = {f"{name}_manifest.tsv" for name in ("train", "validation", "test")}
    there = {path.name for path in (copy.folder / "data/prepared").iterdir()}
    assert there == {"dataset.json", *lists}
    cached = sum(p.stat().st_size for p in (copy.folder / ".dvc/cache").rglob("*") if p.is_file())
    assert cached < 20_000
    assert "images" not in copy.run("git", "status", "--porcelain")
    assert ran(copy.run("dvc", "repro", "prepare")) == []
