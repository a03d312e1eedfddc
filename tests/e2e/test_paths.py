"""Every stage with a policy between paths, and the dial of the model that comes out."""

import json
import sys
from pathlib import Path

import pytest
from repository_copy import TINY, make_workplace

from pipeline.models import checkpoint
from stages import (
    baseline,
    benchmark,
    curriculum,
    evaluate,
    finetune,
    policy_pretrain,
    pretrain,
    prune,
    report,
    sole,
    static,
)
from stages.support import common
from tools import predict

pytestmark = pytest.mark.e2e
WITH_PATHS = TINY | {
    "policy_net": {"width": 4, "paths": [0, 3, 6]},
    "policy_pretrain": {"epochs": 2, "batch_size": 16, "lr": 0.02},  # not so good that it answers all
    "pretrain": {"epochs": 12, "batch_size": 16},
    "prune": {"ratio": 0.5, "epochs": 1, "batch_size": 16},
    "finetune": {"epochs": 4, "batch_size": 16},
    "static": {"rules": ["distribute"], "num_kept": [3]},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """In one process: importing PyTorch for each stage would take most of the time."""
    folder = tmp_path_factory.mktemp("paths")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.setenv("BLOCKDROP_TRACKING", "off")
        patch.setenv("BLOCKDROP_DEVICE", "cpu")
        params = make_workplace(folder, changes=WITH_PATHS)
        for stage in (pretrain, prune, policy_pretrain, curriculum, finetune, evaluate):
            stage.main(params)
        sole.main(params, depth=8)
        static.main(params, rule="distribute", num_kept=3)
        for stage in (baseline, benchmark, report):
            stage.main(params)
    return folder


@pytest.fixture(autouse=True)
def in_project(project, monkeypatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")


def test_the_classifier_of_policy_pretrain_is_in_the_finetuned_pair():
    classifier = checkpoint.load(Path("models/policy_pretrain")).need_resnet().state_dict()
    policy_net = checkpoint.load(Path("models/finetune")).need_policy_net()
    features = policy_net.features.state_dict()
    assert all(features[name].equal(tensor) for name, tensor in classifier.items())
    assert [path.count("1") for path in policy_net.path_values.paths] == [0, 3, 6]


def test_executors_of_the_benchmark_agree_with_the_reference():
    measured = json.loads(Path("plots/benchmark/benchmark.json").read_text())
    timed = [row for row in measured["times"] if row["kind"] == "blockdrop"]
    assert timed
    assert all(row["agreement"]["agrees"] for row in timed)


def test_the_dial_has_the_whole_front_and_the_report_draws_it():
    rows = common.read_csv(Path("plots/evaluate/dial.csv"))
    flops = [float(row["flops"]) for row in rows]
    assert len(rows) == 9
    assert flops == sorted(flops)
    evaluated = json.loads(Path("metrics/evaluate.json").read_text())
    assert 0 < evaluated["flops_mean"] < evaluated["full_flops"]
    assert "policy_pretrain" in Path("report/report.md").read_text()


def test_predict_turns_the_dial(monkeypatch, capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "a.png")

    def flops_at(*options: str) -> float:
        words = ["predict", str(tmp_path / "a.png"), "--json", *options]
        monkeypatch.setattr(sys, "argv", words)
        predict.main()
        return json.loads(capsys.readouterr().out)["flops"]

    assert flops_at("--gamma", "0") <= flops_at("--gamma", "1e6")
    with pytest.raises(SystemExit, match="budget 7 is out of this model's reach; it takes"):
        flops_at("--budget", "7")
