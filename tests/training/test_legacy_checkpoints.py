"""The authors' files: read in each of their layouts, and never run."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from legacy_files import as_layers, staged

from pipeline.models.checkpoint import CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.training import legacy_checkpoints

ARGUMENTS = argparse.Namespace(lr=0.1, model="R32_C10")


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Batch statistics that are not those of a fresh network."""
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    torch.manual_seed(0)
    return randomise(cifar_resnet(depth=14, width=4, num_classes=3))


@pytest.fixture(scope="module")
def policy_net() -> PolicyNet:
    torch.manual_seed(1)
    return randomise(PolicyNet(num_blocks=6, depth=8, width=4))


def as_blocks(network: ResNet) -> dict[str, torch.Tensor]:
    return staged(network, "blocks.{stage}")


def as_agent(network: PolicyNet) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in as_blocks(network.features).items():
        weights[f"logit{name[2:]}" if name.startswith("fc.") else f"features.{name}"] = tensor
    return weights | {"vnet.weight": torch.zeros(1, 16), "vnet.bias": torch.zeros(1)}


def parallel(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt_R32_C10.t7"


def write(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        legacy_checkpoints.load(path)
    return str(caught.value)


def same(loaded: torch.nn.Module, source: torch.nn.Module) -> None:
    own, other = loaded.state_dict(), source.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), source(images))


@pytest.mark.parametrize(("name", "wrap"), [(as_layers, parallel), (as_blocks, dict)])
def test_resnet_is_read_in_each_way_of_naming(path, resnet, name, wrap):
    write(path, {"args": ARGUMENTS, "epoch": 3, "acc": 92.5, "state_dict": wrap(name(resnet))})
    loaded = legacy_checkpoints.load(path)
    same(loaded.need_resnet(path), resnet)
    assert (loaded.resnet.depth, loaded.resnet.width, loaded.resnet.num_classes) == (14, 4, 3)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(CheckpointError, match=f"{path} holds a ResNet and no policy; import it for"):
        loaded.need_policy_net(path)


@pytest.mark.parametrize(("key", "wrap"), [("agent", parallel), ("net", dict)])
def test_policy_is_read_under_its_new_and_its_old_key(path, policy_net, key, wrap):
    unused = {"features.fc.weight": torch.ones(10, 16), "features.fc.bias": torch.ones(10)}
    content = {key: wrap(as_agent(policy_net) | unused), "reward": 1.0}
    loaded = legacy_checkpoints.load(write(path, content))
    same(loaded.need_policy_net(path), policy_net)
    assert loaded.policy_net.num_blocks == 6
    with pytest.raises(CheckpointError, match=f"{path} holds a policy and no ResNet .*for pretrain"):
        loaded.need_resnet(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_finetuned_file_gives_both(path, resnet, policy_net, zipped):
    content = {"agent": as_agent(policy_net), "resnet": as_layers(resnet)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = legacy_checkpoints.load(path)
    same(loaded.need_resnet(path), resnet)
    same(loaded.need_policy_net(path), policy_net)


def test_batch_counters_of_newer_files_are_kept(path, resnet):
    counters = {"bn1.num_batches_tracked": torch.tensor(7)}
    loaded = legacy_checkpoints.load(write(path, {"state_dict": as_layers(resnet) | counters}))
    assert loaded.resnet.bn1.num_batches_tracked == 7
    assert loaded.resnet.blocks[0].bn1.num_batches_tracked == 0


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(("zipped", "place"), [(False, "args"), (True, "state_dict")])
def test_command_in_a_file_is_refused_named_and_not_run(path, resnet, zipped, place):
    content = {"state_dict": as_layers(resnet)} | {place: Command(f"touch {path.parent / 'ran'}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert f"{path} is refused" in message
    assert f"({os.name}.system)" in message
    assert "take the file from its authors" in message
    assert "weights_only" not in message  # how to switch the protection off
    assert "add_safe_globals" not in message
    assert not (path.parent / "ran").exists()


def test_class_of_an_unknown_module_is_not_imported(path, monkeypatch):
    (path.parent / "strange_module.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Thing:\n    pass\n"
    )
    monkeypatch.syspath_prepend(path.parent)
    import strange_module

    write(path, {"state_dict": strange_module.Thing()})
    monkeypatch.delitem(sys.modules, "strange_module")
    (path.parent / "ran").unlink()
    message = refusal(path)
    assert f"{path} is refused" in message
    assert "(strange_module.Thing)" in message
    assert "strange_module" not in sys.modules
    assert not (path.parent / "ran").exists()


def test_whole_pickled_network_is_refused(path, resnet):
    message = refusal(write(path, resnet))
    assert f"{path} is refused" in message
    assert "(pipeline.models.resnet.ResNet)" in message


@pytest.mark.parametrize(("zipped", "share"), [(False, 0.01), (False, 0.99), (True, 0.5), (True, 0.99)])
def test_truncated_file_is_refused(path, resnet, zipped, share):
    torch.save({"state_dict": as_layers(resnet)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", b"\x80\x02"])
def test_file_that_is_no_checkpoint_says_so_and_what_to_do(path, content):
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "take the file" in message


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_file_without_a_dict_is_named(path, content):
    assert f"{path} holds a {type(content).__name__}, not a checkpoint" in refusal(write(path, content))


@pytest.mark.parametrize("content", [{}, {"epoch": 2, 1: 2}])
def test_file_without_known_keys_lists_those_that_it_has(path, content):
    message = refusal(write(path, content))
    assert f"{path} holds none of resnet, state_dict, model, agent, net" in message
    assert all(repr(key) in message for key in content)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("state_dict", 3, "is no table of weights"),
        ("agent", {}, "is no table of weights"),
        ("resnet", {"conv1.weight": 3}, "holds more than named, plain tensors"),
        ("net", {1: torch.zeros(1)}, "holds more than named, plain tensors"),
        ("model", {"conv1.weight": torch.zeros(1).expand(10**9)}, "claims more weights than the file"),
    ],
)
def test_table_that_holds_no_weights_is_named(path, key, value, problem):
    assert f"{path}: {key} {problem}" in refusal(write(path, {key: value}))


def without(start: str):
    return lambda weights: {name: t for name, t in weights.items() if not name.startswith(start)}


def also(name: str, tensor: torch.Tensor):
    return lambda weights: weights | {name: tensor}


def fourth_stage(weights: dict) -> dict:
    of_third = {name: tensor for name, tensor in weights.items() if "layer3" in name}
    return weights | {name.replace("layer3", "layer4"): t.clone() for name, t in of_third.items()}


SAME = "the same number in each of three"
TWICE = "state_dict has a weight under two names"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("conv1.weight"), "conv1"),
        (without("fc.weight"), "lacks fc.weight, or it is a single number"),
        (without("fc.bias"), "fc.bias"),
        (without("bn1.running_mean"), "bn1.running_mean"),
        (also("layer1.0.downsample.0.weight", torch.zeros(1)), "unknown blocks.0.shortcut.0.weight"),
        (without("layer3."), SAME),
        (without("layer2.1."), SAME),
        (without("layer"), SAME),
        (fourth_stage, SAME),
        (also("module.fc.bias", torch.zeros(3)), TWICE),
        (also("blocks.0.0.conv1.weight", torch.zeros(4, 4, 3, 3)), TWICE),
        (also("conv1.weight", torch.zeros(())), "conv1.weight"),
        (also("fc.weight", torch.zeros(0)), ""),
        (also("bn1.weight", torch.zeros(1)), "bn1.weight"),
        (also("fc.bias", torch.tensor([float("nan"), 0, 0])), "fc.bias holds NaN"),
        (lambda weights: {name: t.half() for name, t in weights.items()}, "torch.float16"),
    ],
)
def test_resnet_whose_weights_do_not_fit_is_refused(path, resnet, change, problem):
    message = refusal(write(path, {"state_dict": change(as_layers(resnet))}))
    assert str(path) in message
    assert problem in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("features.conv1.weight"), "lacks features.conv1.weight"),
        (without("logit.weight"), "lacks logit.weight"),
        (without("logit.bias"), "lacks logit.bias"),
        (without("features.blocks.1.0.bn2.weight"), "features.blocks.1.bn2"),
        (also("features.conv1.weight", torch.zeros(1)), ""),
        (also("logit.weight", torch.zeros(())), "logit.weight, or it is a single number"),
        (also("logit.bias", torch.zeros(1)), ""),
    ],
)
def test_policy_whose_weights_do_not_fit_is_refused(path, policy_net, change, problem):
    message = refusal(write(path, {"agent": change(as_agent(policy_net))}))
    assert str(path) in message
    assert problem in message


@pytest.mark.parametrize(
    ("stage", "block"), [("layer{}", "9999"), ("blocks.{}", "9999999"), ("layer{}", "9" * 5000)]
)
def test_name_that_claims_a_huge_network_is_refused(path, resnet, stage, block):
    last = {f"{stage.format(n)}.{block}.conv1.weight": torch.zeros(1) for n in (1, 2, 3)}
    message = refusal(write(path, {"state_dict": as_layers(resnet) | last}))
    assert str(path) in message
    assert re.search(r"depth 60002|blocks in its stages|unknown (layer|blocks)", message)
    assert len(message) < 1000


def test_missing_file_is_named(path):
    assert f"{path} does not exist" in refusal(path)


def test_folder_in_place_of_the_file_is_named(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
