"""The authors' R101_ImgNet files and their like: read, and as good as by their own definition."""

import argparse
import json
import tarfile
from pathlib import Path

import authors_imagenet as authors
import pytest
import torch
import torchvision
import yaml
from image_tree import write_tree
from repository_copy import changed

from pipeline.config import load
from pipeline.data.dataset import load_split
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CheckpointError
from pipeline.training import legacy_checkpoints
from stages import check, curriculum, evaluate, finetune, prepare, pretrain, prune, static

SIZES = (3, 4, 23, 3)
RESNET, AGENT = authors.pair(SIZES, width=8, classes=5)


def parallel(weights: authors.Weights) -> authors.Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt_E_10_A_0.764_R_-8.46E-01_S_24.77_#_10.t7"


def write(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("wrap", [dict, parallel])
def test_logits_of_the_imported_pair_are_the_authors(path, wrap):
    content = {"agent": wrap(AGENT), "resnet": wrap(RESNET), "epoch": 10, "reward": -0.8, "acc": 0.76}
    loaded = legacy_checkpoints.load(write(path, content))
    resnet, policy_net = loaded.need_resnet(path).eval(), loaded.need_policy_net(path).eval()
    assert (resnet.family, resnet.depth, resnet.width, resnet.num_classes) == ("imagenet", 101, 8, 5)
    assert (policy_net.features.family, policy_net.features.depth) == ("imagenet", 10)
    assert (policy_net.num_blocks, policy_net.input_size) == (33, 112)
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    policy = torch.rand(3, 33, generator=torch.Generator().manual_seed(6)) < 0.7
    policy[0] = True
    policy[1, [0, 3, 7, 30]] = False  # the blocks whose shortcuts have weights
    with torch.no_grad():
        found = resnet(images, policy), policy_net(images)
        expected = authors.classify(RESNET, images, policy), authors.decide(AGENT, images)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_the_resnet_that_the_authors_began_with_is_read(path):
    content = {"state_dict": parallel(authors.as_torchvision(RESNET)), "arch": "resnet101"}
    loaded = legacy_checkpoints.load(write(path, content)).need_resnet(path)
    pair = legacy_checkpoints.load(write(path, {"resnet": RESNET})).need_resnet(path)
    assert all(torch.equal(t, pair.state_dict()[name]) for name, t in loaded.state_dict().items())


def training_file(weights: dict, key: str, network: torch.nn.Module) -> dict:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    return {
        "epoch": 90, "arch": "resnet18", key: weights, "best_acc1": torch.tensor(69.7),
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(lr=0.1),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["example", "references", "bare", "compiled"])
def test_files_of_torchvision_and_of_pytorchs_example_are_read(path, form):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5)
    own = network.state_dict()
    content = {
        "example": training_file(parallel(own), "state_dict", network),
        "references": training_file(dict(own), "model", network),
        "bare": parallel(own),
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in own.items()},
    }[form]
    torch.save(content, path, _use_new_zipfile_serialization=form != "bare")
    resnet = legacy_checkpoints.load(path).need_resnet(path).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(resnet(images), network.eval()(images), atol=1e-4)


def test_model_may_be_the_name_of_the_network(path):
    content = {"model": "resnet101", "state_dict": RESNET}
    assert legacy_checkpoints.load(write(path, content)).need_resnet(path).depth == 101


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        legacy_checkpoints.load(path)
    return str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 178\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>Virus scan", "is an HTML or XML page in place of the file"),
        (b'\n\n<?xml version="1.0"?><Error>', "is an HTML or XML page in place of the file"),
        (LFS, "is a Git LFS pointer"),
    ],
)
def test_page_or_pointer_in_place_of_a_file_is_called_so(path, content, words):
    path.write_bytes(content)
    message = refusal(path)
    assert f"{path} {words}" in message
    assert ("git lfs pull" in message) == (content is LFS)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.SIDECAR])
def test_pointer_in_our_own_checkpoint_is_called_so(tmp_path, name):
    from builders import small_pair

    checkpoint.save(small_pair(classes=("a", "b"), image_size=8), tmp_path)
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        checkpoint.load(tmp_path)


def genuine_files() -> dict[str, object]:
    resnext = torchvision.models.resnet18(num_classes=5)
    resnext.layer1[0].se = torch.nn.Linear(2, 2)
    cifar = {name.replace("downsample", "shortcut"): t for name, t in resnext.state_dict().items()}
    cifar["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    return {
        "more weights": resnext.state_dict(),
        "four stages at 3x3": cifar,
        "whole network": torchvision.models.resnet18(num_classes=5),
        "VGG": torchvision.models.squeezenet1_0().state_dict(),
        "half precision": {name: t.half() for name, t in RESNET.items()},
    }


@pytest.mark.parametrize("form", list(genuine_files()))
def test_no_genuine_file_that_can_not_be_taken_is_called_broken(path, form):
    message = refusal(write(path, genuine_files()[form]))
    assert not any(word in message for word in ("damaged", "broken", "anew", "cut short"))
    assert "take " in message or "as no ResNet here has" in message


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_torchscript_is_called_so(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    message = refusal(path)
    assert "TorchScript" in message
    assert "weights_only" not in message


def test_a_file_of_the_first_format_is_called_so(path, tmp_path):
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    assert "first format (tar)" in refusal(path)


SMALL = {
    "data": {
        "source": "imagefolder_stream", "image_size": 224, "validation_fraction": 0.25,
        "test_fraction": None,
    },
    "augmentation": {"crop_padding": 0, "flip": True},
    "resnet": {"family": "imagenet", "depth": 26, "width": 8},
    "policy_net": {"family": "imagenet", "depth": 10, "width": 8, "input_size": 112},
    "checkpoints": {"pretrain": "import/resnet", "curriculum": "import/agent.t7"},
    "finetune": {"epochs": 0},
    "evaluate": {"shuffles": 2, "single_policies": 4, "bootstrap": 100},
    "benchmark": {"sole_depths": [14]},
    "sole": {"depths": [14]},
    "static": {"rules": ["distribute"], "num_kept": [5]},
}  # fmt: skip


@pytest.mark.e2e
def test_policy_after_the_curriculum_is_the_authors(tmp_path, monkeypatch):
    """An {agent} file with the original ResNet: policy and class of every image are theirs."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(SMALL), sort_keys=False))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(write_tree(tmp_path / "elsewhere", train=8, test=3))
    (tmp_path / "import").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    resnet, agent = authors.pair((2, 2, 2, 2), width=8, classes=3)
    write(Path("import/resnet"), {"state_dict": parallel(authors.as_torchvision(resnet))})
    write(Path("import/agent.t7"), {"agent": agent, "epoch": 5, "reward": 0.2, "acc": 0.75})
    params = load(tmp_path / "params.yaml")
    check.main()
    for stage in (prepare, pretrain, prune, curriculum, finetune, evaluate):
        stage.main(params)
    static.main(params, rule="distribute", num_kept=5)
    names = ("pretrain", "static/distribute-5")
    before, after = (Path(f"models/{name}/model.safetensors") for name in names)
    assert before.read_bytes() == after.read_bytes()
    rows = Path("plots/evaluate/images.csv").read_text().splitlines()[1:]
    own = checkpoint.load(Path("models/finetune"))
    test = load_split(Path("data/prepared"), "test", torch.device("cpu"))
    images = torch.cat([own.normalisation(part) for part in test.iter_batches(100)])
    with torch.no_grad():
        policy = authors.decide(agent, images) >= 0
        classes = authors.classify(resnet, images, policy).argmax(dim=1)
    for row, actions, predicted in zip(rows, policy, classes, strict=True):
        cells = row.split(",")
        assert cells[5] == "".join(str(int(action)) for action in actions)
        assert int(cells[2]) == int(predicted)
    told = json.loads(Path("metrics/finetune.json").read_text())["finetune"]
    assert told["active_blocks"] == 8
