"""Every stage on a tree of real images that is streamed, with a small bottleneck network."""

import json

import pytest
from image_tree import write_tree
from repository_copy import Copy, make_copy, ran

from pipeline import checkpoint
from pipeline.imagenet_resnet import ImageNetResNet

pytestmark = pytest.mark.e2e
SMALL = {
    "data": {
        "source": "imagefolder_stream", "image_size": 64, "validation_share": 0.25, "test_share": None,
    },
    "augmentation": {"crop_padding": 0, "flip": True},
    "resnet": {"family": "imagenet", "depth": 26, "width": 4},
    "policy_net": {"family": "imagenet", "depth": 10, "width": 4, "input_size": 32},
    "pretrain": {"epochs": 2, "batch_size": 16},
    "curriculum": {"epochs": 5, "batch_size": 16},
    "finetune": {"epochs": 2, "batch_size": 16},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {"batch_sizes": [1, 8], "rounds": 5, "seconds": 0.1, "sole_depths": [14]},
    "sole": {"depths": [14]},
    "static": {"rules": ["distribute"], "kept": [5]},
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    made = make_copy(tmp_path_factory.mktemp("copy"), changes=SMALL)
    tree = write_tree(tmp_path_factory.mktemp("elsewhere") / "tree")
    (made.folder / "data").mkdir(exist_ok=True)
    (made.folder / "data/images").symlink_to(tree)
    return made


def test_every_stage_runs_on_a_streamed_tree(copy):
    output = copy.run("dvc", "repro")
    assert set(ran(output)) == {
        "check", "prepare", "pretrain", "curriculum", "finetune", "evaluate", "sole@14",
        "static@distribute-5", "baseline", "benchmark", "report",
    }  # fmt: skip
    evaluated, baseline = copy.metrics("evaluate"), copy.metrics("baseline")
    assert evaluated["num_blocks"] == 8
    assert evaluated["full_flops"] == baseline["baseline"]["flops"]
    assert evaluated["full_accuracy"] == baseline["baseline"]["accuracy"]
    own = checkpoint.load(copy.folder / "models/finetune")
    assert isinstance(own.resnet, ImageNetResNet)
    assert own.image_size == 64
    benchmark = json.loads((copy.folder / "plots/benchmark/benchmark.json").read_text())
    assert "native fp32" in benchmark["left_out"]
    timed = {row["contestant"] for row in benchmark["times"] if row["kind"] == "blockdrop"}
    assert timed == {"masked", "gather", "grouped"}
    assert all(row["agrees"] for row in benchmark["times"] if row["kind"] == "blockdrop")
    assert "ResNet-26" in (copy.folder / "report/report.md").read_text()


def test_images_are_in_no_cache_and_a_second_repro_runs_nothing(copy):
    assert ran(copy.run("dvc", "repro")) == []
    prepared = {path.name for path in (copy.folder / "data/prepared").iterdir()}
    assert prepared == {"dataset.json", *(f"{s}_manifest.tsv" for s in ("train", "validation", "test"))}


def test_the_same_weights_whichever_processes_decode(copy, monkeypatch):
    before = copy.outs()
    monkeypatch.setenv("BLOCKDROP_WORKERS", "2")
    copy.run("dvc", "repro", "-f", "-s", "pretrain")
    assert copy.outs() == before
