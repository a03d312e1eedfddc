"""Stage prune: off it passes on, on it cuts and finetunes, and what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import enter_project, trained
from repository_copy import TINY, make_workplace

from pipeline.config import Params
from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.pruning.allocation import uniform
from stages import finetune, pretrain, prune, static
from stages.support import recipes, training

PRETRAINED, PRUNED = Path("models/pretrain"), Path("models/prune")
SMALL = TINY | {"prune": {"epochs": 2, "batch_size": 16}, "finetune": {"epochs": 1, "batch_size": 16}}


@pytest.fixture
def params(tmp_path, monkeypatch) -> Params:
    """In a workplace of its own, with a pretrained ResNet, which is left as the current folder."""
    enter_project(tmp_path, monkeypatch)
    made = make_workplace(tmp_path, changes=SMALL)
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    checkpoint.save(networks(made), PRETRAINED)
    return made


def networks(params: Params, *, inner_channels=None) -> Checkpoint:
    network = params.resnet
    torch.manual_seed(0)
    resnet = make_resnet(
        family=network.family, depth=network.depth, width=network.width, num_classes=3,
        inner_channels=inner_channels,
    )  # fmt: skip
    return Checkpoint(
        stage="pretrain",
        resnet=trained(resnet),
        policy_net=None,
        normalisation=recipes.normalisation_of(params),
        image_size=8,
        classes=("dark", "grey", "light"),
        metrics={"accuracy": 0.5},
    )


def changed(params: Params, **changes) -> Params:
    """With other values in the section prune."""
    return params.model_copy(update={"prune": params.prune.model_copy(update=changes)})


def imported(params: Params, **paths: Path) -> Params:
    texts = {stage: str(path) for stage, path in paths.items()}
    return params.model_copy(update={"checkpoints": params.checkpoints.model_copy(update=texts)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ratio_0_passes_the_checkpoint_on_to_the_byte(params):
    prune.main(params)
    assert contents(PRUNED) == contents(PRETRAINED)
    assert Path("plots/prune.csv").read_text().strip() == "epoch,train_accuracy,validation_accuracy"
    assert Path("metrics/prune.json").read_text().split() == ["{", '"prune":', "{}", "}"]


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_channels_are_cut_and_what_is_left_is_finetuned(params, criterion, capsys):
    prune.main(changed(params, ratio=0.5, criterion=criterion))
    before, after = (checkpoint.load(path).need_resnet() for path in (PRETRAINED, PRUNED))
    assert after.inner_channels == uniform(before, 0.5) != before.inner_channels
    assert not torch.equal(before.fc.weight, after.fc.weight)
    assert len(Path("plots/prune.csv").read_text().splitlines()) == 3
    assert "4, 8, 8 of 4, 8, 16 channels inside the blocks of the stages" in capsys.readouterr().out


def test_without_epochs_it_is_only_cut(params):
    prune.main(changed(params, ratio=0.5, epochs=0))
    before, after = (checkpoint.load(path).need_resnet() for path in (PRETRAINED, PRUNED))
    assert after.is_pruned
    assert torch.equal(before.fc.weight, after.fc.weight)


def test_sensitivity_shows_what_each_stage_loses(params, capsys):
    prune.main(changed(params, ratio=0.5, scope="sensitivity", epochs=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation images" in line]
    assert len(lines) == 2  # every channel, and half of the last stage's; the others have 8 or fewer
    assert lines[1].startswith("prune: 4, 8, 8 of 4, 8, 16 channels")


def test_an_interrupted_training_goes_on_with_its_channels(params, monkeypatch):
    """Rounding that differs must not give it others: they are found once."""
    section = changed(params, ratio=0.5, scope="sensitivity")
    prune.main(section)
    whole = contents(PRUNED)
    for path in Path(".resume").glob("prune-*.finished.pt"):
        path.unlink()

    def fail(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write_results", fail)
        with pytest.raises(RuntimeError, match="killed"):
            prune.main(section)
    with monkeypatch.context() as patch:
        patch.setattr(prune, "kept_channels", fail)
        prune.main(section)
    assert contents(PRUNED) == whole


def test_static_and_finetune_start_from_the_pruned_network(params):
    prune.main(changed(params, ratio=0.5))
    static.main(params, rule="first", num_kept=3)
    channels = checkpoint.load(PRUNED).need_resnet().inner_channels
    assert checkpoint.load(Path("models/static/first-3")).need_resnet().inner_channels == channels


@pytest.mark.parametrize(
    ("channels", "ratio", "words"),
    [
        (((4,), (8,), (8,)), 0.0, "channels inside the blocks is .* set prune.ratio in params.yaml"),
        (((4,), (8,), (12,)), 0.5, "channels inside the blocks is .* set prune.ratio in params.yaml"),
        (((4,), (8,), (8,)), 0.5, None),
    ],
)
def test_imported_pruned_network_has_the_channels_of_params_yaml(params, channels, ratio, words):
    blocks = params.resnet.num_blocks // 3
    wide = tuple(count for count in channels for _ in range(blocks))
    checkpoint.save(networks(params, inner_channels=wide), Path("other"))
    section = imported(changed(params, ratio=ratio), prune=Path("other"))
    if words is None:
        prune.main(section)
        assert checkpoint.load(PRUNED).need_resnet().inner_channels == wide
        return
    with pytest.raises(CheckpointError, match=words):
        prune.main(section)


def test_a_pruned_network_is_refused_where_a_whole_one_belongs(params):
    channels = uniform(networks(params).need_resnet(), 0.5)
    pruned = networks(params, inner_channels=channels)
    checkpoint.save(pruned, Path("other"))
    with pytest.raises(CheckpointError, match="other holds a pruned ResNet; import it for prune"):
        pretrain.main(imported(params, pretrain=Path("other")))
    prune.main(params)
    checkpoint.save(pruned, Path("others/first-3"))
    with pytest.raises(CheckpointError, match="import for prune the ResNet that it was finetuned"):
        static.main(imported(params, static=Path("others")), rule="first", num_kept=3)
    policy_net = PolicyNet(num_blocks=params.resnet.num_blocks, depth=8, width=4)
    checkpoint.save(replace(pruned, policy_net=policy_net), Path("pair"))
    with pytest.raises(CheckpointError, match=r"pair: its blocks have 4, .* those of models/prune 4, "):
        finetune.load_pair(Path("pair"), params, checkpoint.load(PRUNED))
