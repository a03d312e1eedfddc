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


def same(loaded: torch.nn.Module, source: torch.nn.Module) -> bool:
    own, other = loaded.state_dict(), source.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), source(images))
    return True


@pytest.mark.parametrize("name", [as_layers, as_blocks])
@pytest.mark.parametrize("wrap", [dict, parallel])
def test_resnet_is_read_in_each_way_of_naming(path, resnet, name, wrap):
    write(path, {"args": ARGUMENTS, "epoch": 3, "acc": 92.5, "state_dict": wrap(name(resnet))})
    loaded = legacy_checkpoints.load(path)
    assert same(loaded.need_resnet(path), resnet)
    assert (loaded.resnet.depth, loaded.resnet.width, loaded.resnet.num_classes) == (14, 4, 3)
    assert loaded.policy_net is None


@pytest.mark.parametrize("key", ["agent", "net"])
@pytest.mark.parametrize("wrap", [dict, parallel])
def test_policy_is_read_under_its_new_and_its_old_key(path, policy_net, key, wrap):
    loaded = legacy_checkpoints.load(write(path, {key: wrap(as_agent(policy_net)), "reward": 1.0}))
    assert same(loaded.need_policy_net(path), policy_net)
    assert loaded.policy_net.num_blocks == 6
    assert loaded.resnet is None


def test_finetuned_file_gives_both(path, resnet, policy_net):
    loaded = legacy_checkpoints.load(
        write(path, {"agent": as_agent(policy_net), "resnet": as_layers(resnet)})
    )
    assert same(loaded.need_resnet(path), resnet)
    assert same(loaded.need_policy_net(path), policy_net)


def test_classifier_that_the_policy_carries_unused_is_left_out(path, policy_net):
    unused = {"features.fc.weight": torch.ones(10, 16), "features.fc.bias": torch.ones(10)}
    loaded = legacy_checkpoints.load(write(path, {"agent": as_agent(policy_net) | unused}))
    assert same(loaded.need_policy_net(path), policy_net)


def test_batch_counters_of_newer_files_are_kept(path, resnet):
    counters = {"bn1.num_batches_tracked": torch.tensor(7)}
    loaded = legacy_checkpoints.load(write(path, {"state_dict": as_layers(resnet) | counters}))
    assert loaded.resnet.bn1.num_batches_tracked == 7
    assert loaded.resnet.blocks[0].bn1.num_batches_tracked == 0


def test_zip_format_is_read_too(path, resnet):
    torch.save({"state_dict": as_layers(resnet)}, path)
    assert same(legacy_checkpoints.load(path).resnet, resnet)


def test_policy_alone_is_refused_where_a_resnet_is_needed(path, policy_net):
    loaded = legacy_checkpoints.load(write(path, {"agent": as_agent(policy_net)}))
    with pytest.raises(CheckpointError) as caught:
        loaded.need_resnet(path)
    assert f"{path} holds a policy and no ResNet" in str(caught.value)
    assert "import it for the stage curriculum" in str(caught.value)


def test_resnet_alone_is_refused_where_a_policy_is_needed(path, resnet):
    loaded = legacy_checkpoints.load(write(path, {"state_dict": as_layers(resnet)}))
    with pytest.raises(CheckpointError) as caught:
        loaded.need_policy_net(path)
    assert f"{path} holds a ResNet and no policy; import it for pretrain" in str(caught.value)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["args", "state_dict"])
def test_command_in_a_file_is_refused_named_and_not_run(path, resnet, zipped, place):
    content = {"state_dict": as_layers(resnet)} | {place: Command(f"touch {path.parent / 'ran'}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert f"{path} is refused" in message
    assert f"({os.name}.system)" in message
    assert "take the file from its authors" in message
    assert not (path.parent / "ran").exists()


def test_class_of_an_unknown_module_is_refused_named_and_not_imported(path, monkeypatch):
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


def test_refusal_does_not_tell_how_to_switch_the_protection_off(path):
    message = refusal(write(path, {"args": Command("true")}))
    assert "weights_only" not in message
    assert "add_safe_globals" not in message


def test_namespace_is_not_allowed_for_other_readers_afterwards(path, resnet):
    legacy_checkpoints.load(write(path, {"args": ARGUMENTS, "state_dict": as_layers(resnet)}))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(path, resnet, zipped, share):
    torch.save({"state_dict": as_layers(resnet)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [b"", b"text\n", b"\0" * 100, b"PK\x03\x04", b"\x80\x02"])
def test_file_that_is_no_checkpoint_says_so_and_what_to_do(path, content):
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "take the file" in message


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", 3])
def test_file_without_a_dict_is_named(path, content):
    message = refusal(write(path, content))
    assert f"{path} holds a {type(content).__name__}, not a checkpoint" in message


@pytest.mark.parametrize("content", [{"weights": 1, "epoch": 2}, {}, {1: 2}, {"epoch": 2, 1: 2}])
def test_file_without_known_keys_lists_those_that_it_has(path, content):
    message = refusal(write(path, content))
    assert f"{path} holds none of resnet, state_dict, model, agent, net" in message
    assert all(repr(key) in message for key in content)


@pytest.mark.parametrize("key", ["state_dict", "resnet", "model", "agent", "net"])
@pytest.mark.parametrize("value", [None, 3, [], {}, {"conv1.weight": 3}, {1: torch.zeros(1)}])
def test_table_that_holds_no_weights_is_named(path, key, value):
    message = refusal(write(path, {key: value}))
    assert f"{path}: {key} " in message


@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight", "fc.bias", "bn1.running_mean"])
def test_resnet_without_one_of_its_weights_names_it(path, resnet, name):
    weights = as_layers(resnet)
    del weights[name]
    message = refusal(write(path, {"state_dict": weights}))
    assert str(path) in message
    assert name.split(".")[0] in message


@pytest.mark.parametrize(
    "name",
    ["features.conv1.weight", "logit.weight", "logit.bias", "features.blocks.1.0.bn2.weight"],
)
def test_policy_without_one_of_its_weights_names_it(path, policy_net, name):
    weights = as_agent(policy_net)
    del weights[name]
    message = refusal(write(path, {"agent": weights}))
    assert str(path) in message
    assert name.replace("1.0", "1").removesuffix(".weight").removesuffix(".bias") in message


def test_unknown_weight_is_named(path, resnet):
    weights = as_layers(resnet) | {"layer1.0.downsample.0.weight": torch.zeros(1)}
    message = refusal(write(path, {"state_dict": weights}))
    assert str(path) in message
    assert "unknown blocks.0.shortcut.0.weight" in message


@pytest.mark.parametrize("left_out", ["layer3.", "layer2.1.", "layer"])
def test_stages_of_unequal_length_are_refused(path, resnet, left_out):
    kept = {k: v for k, v in as_layers(resnet).items() if not k.startswith(left_out)}
    message = refusal(write(path, {"state_dict": kept}))
    assert str(path) in message
    assert "the same number in each of three" in message


@pytest.mark.parametrize("block", ["9999", "9999999", "9" * 5000])
@pytest.mark.parametrize("stage", ["layer{}", "blocks.{}"])
def test_name_that_claims_a_huge_network_is_refused_before_it_is_built(path, resnet, stage, block):
    last = {f"{stage.format(n)}.{block}.conv1.weight": torch.zeros(1) for n in (1, 2, 3)}
    message = refusal(write(path, {"state_dict": as_layers(resnet) | last}))
    assert str(path) in message
    assert re.search(r"depth 60002|blocks in its stages|unknown (layer|blocks)", message)
    assert len(message) < 1000


@pytest.mark.parametrize("twice", ["module.fc.bias", "blocks.0.0.conv1.weight"])
def test_weight_that_is_there_under_two_names_is_refused(path, resnet, twice):
    weights = as_layers(resnet)
    weights |= {twice: weights["fc.bias" if "fc" in twice else "layer1.0.conv1.weight"].clone()}
    assert f"{path}: state_dict has a weight under two names" in refusal(
        write(path, {"state_dict": weights})
    )


def test_fourth_stage_is_refused(path, resnet):
    weights = as_layers(resnet)
    weights |= {k.replace("layer3", "layer4"): v.clone() for k, v in weights.items() if "layer3" in k}
    assert "the same number in each of three" in refusal(write(path, {"state_dict": weights}))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight", "bn1.weight"])
@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_resnet_weight_of_another_shape_is_named(path, resnet, name, shape):
    weights = as_layers(resnet) | {name: torch.zeros(shape)}
    assert str(path) in refusal(write(path, {"state_dict": weights}))


@pytest.mark.parametrize("name", ["features.conv1.weight", "logit.weight", "logit.bias"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_policy_weight_of_another_shape_is_named(path, policy_net, name, shape):
    weights = as_agent(policy_net) | {name: torch.zeros(shape)}
    assert str(path) in refusal(write(path, {"agent": weights}))


def test_weight_that_is_nan_is_named(path, resnet):
    weights = as_layers(resnet)
    weights["fc.bias"][0] = float("nan")
    assert f"{path}: fc.bias holds NaN" in refusal(write(path, {"state_dict": weights}))


def test_half_precision_is_refused_by_name(path, resnet):
    weights = {name: tensor.half() for name, tensor in as_layers(resnet).items()}
    message = refusal(write(path, {"state_dict": weights}))
    assert str(path) in message
    assert "torch.float16" in message
    assert "expected torch.float32" in message


def test_missing_file_is_named(path):
    assert f"{path} does not exist" in refusal(path)


def test_folder_in_place_of_the_file_is_named(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
