"""The networks in pretrained/, and the preset that takes them instead of training."""

import json
from pathlib import Path

import pytest
from repository_copy import ROOT

from pipeline.config import NO_FILE
from pipeline.models import checkpoint
from tools.preset import load

FOLDER = ROOT / "pretrained"
DEMO = load("cifar10_demo", ROOT / "presets")
QUICK = load("cifar10_resnet32_quick", ROOT / "presets")
GATES = load("cifar10_gates", ROOT / "presets")
ROW = json.loads((ROOT / "results/rows/cifar10_resnet32_gamma5.json").read_text(encoding="utf-8"))
STAGES = ("pretrain", "curriculum", "finetune", "sole", "static")
NETWORKS = sorted(path.parent for path in FOLDER.rglob("model.json"))


def test_gates_are_the_quick_preset_without_trainings():
    gates, quick = GATES.flat(), QUICK.flat()
    assert gates.keys() == quick.keys()
    changed = {key for key in gates if gates[key] != quick[key]}
    checkpoints = {f"checkpoints.{stage}" for stage in STAGES}
    assert checkpoints <= changed
    assert {key.split(".")[0] for key in changed - checkpoints} <= {"benchmark"}


def test_the_presets_name_what_is_there_and_nothing_else_is():
    named = set()
    for params in (DEMO, GATES):
        folders = params.checkpoints.model_dump()
        sole, static = (ROOT / folders.pop(stage) for stage in ("sole", "static"))
        named |= {ROOT / path for path in folders.values() if path != NO_FILE}
        named |= {sole / str(depth) for depth in params.sole.depths}
        named |= {
            static / f"{rule}-{kept}" for rule in params.static.rules for kept in params.static.num_kept
        }
    assert named == set(NETWORKS)


@pytest.mark.parametrize("folder", NETWORKS, ids=lambda folder: str(folder.relative_to(FOLDER)))
def test_pretrained_networks_are_small_whole_and_fit_the_demo(folder: Path):
    assert (folder / "model.safetensors").stat().st_size < 2_200_000  # both networks
    found = checkpoint.load(folder)  # which checks the digest in model.json
    assert found.normalisation.mean == pytest.approx(DEMO.resnet.mean)
    assert found.image_size == DEMO.data.image_size
    if found.policy_net is not None:
        assert found.policy_net.num_blocks == DEMO.resnet.num_blocks
    if found.resnet is not None and found.stage not in ("sole", "policy_pretrain"):
        assert found.resnet.depth == DEMO.resnet.depth


def test_the_row_of_results_is_of_the_gates():
    """The row is older than the parameters of paths and pruning, which the quick preset does not use."""
    quick = {key: value for key, value in QUICK.flat().items() if key in ROW["params"]}
    assert set(QUICK.flat()) - set(quick) == {
        key
        for key in QUICK.flat()
        if any(part in key for part in ("policy_pretrain", "policy_net.paths", "prune"))
    }
    assert ROW["params"] == json.loads(json.dumps(quick)) | {
        key: ROW["params"][key] for key in ROW["params"] if key.startswith("benchmark.")
    }
