"""The commands: what a preset and an import change and keep from being lost, what speed measures."""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import networks

from pipeline import config
from pipeline.benchmark.peers import PEERS
from pipeline.config import ResNetParams, flatten
from pipeline.inference.auto import make_executor
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CheckpointError
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from research import speed
from tools import import_checkpoint, preset
from tools.import_checkpoint import STAGES, bring_in, check, name_in_params

ROOT = Path(__file__).parents[2]
PARAMS = Path("params.yaml")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A checkout with presets, params.yaml and import/, as working folder."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copyfile(ROOT / "presets" / "digits.yaml", tmp_path / "params.yaml")
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / "none").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# preset


HELD = ("pretrain", "curriculum", "finetune")  # stages whose networks a finetuned pair holds
NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def write_own(name: str, text: str) -> None:
    Path(f"presets/{name}.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_written_whole_and_holds_what_differs_alone(place, name):
    defaults = dict(flatten(config.read("presets/digits.yaml")))
    changes = dict(flatten(config.read(f"presets/{name}.yaml")))
    preset.use(name)
    values = dict(flatten(config.read(PARAMS)))
    assert values == defaults | changes
    assert [type(values[key]) for key in changes] == [type(value) for value in changes.values()]
    params = config.load(PARAMS)
    assert params == preset.load(name)
    assert {"imagefolder_stream": "imagenet"}.get(params.data.source, params.data.source) in name
    if name.startswith("cifar"):  # the authors' gamma, but for our own recipes
        assert (params.gamma == 10) == (not name.endswith(("_quick", "_demo", "_gates")))
    if name != "digits":
        assert [key for key, value in changes.items() if value == defaults[key]] == []
        header, lines = Path(f"presets/{name}.yaml").read_text().split("\n\n", 1)
        assert all(line.startswith("# ") for line in header.splitlines())
        assert header in preset.whole_text(name)
        assert lines


def test_defaults_are_the_params_file_of_the_repository():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets/digits.yaml").read_bytes()


def test_preset_keeps_the_comments_that_it_does_not_replace(place):
    lists = "benchmark:\n  batch_sizes:\n  - 3\n  - 5\n"
    write_own("mine", f"# Mine.\n\ngamma: 4.5 # guessed\n{lists}pretrain: {{lr: 1e-05}}\n")
    preset.use("mine")
    before, after = (Path(path).read_text() for path in ("presets/digits.yaml", PARAMS))
    expected = before.replace("gamma: 2.0", "gamma: 4.5 # guessed", 1)
    expected = expected.replace("batch_sizes: [1, 32, 128]", "batch_sizes: [3, 5]")
    expected = expected.replace(
        "  lr: 0.1\n", "  lr: 1.0e-05\n", 1
    )  # pretrain is the first section with it
    assert after == f"# Mine.\n\n{expected}"
    assert config.load(PARAMS).pretrain.lr == 1e-5


def test_shown_preset_is_what_would_be_written(place, monkeypatch, capsys):
    before = PARAMS.read_bytes()
    monkeypatch.setattr(sys, "argv", ["preset", "--show", "cifar10_demo"])
    preset.main()
    assert PARAMS.read_bytes() == before
    PARAMS.unlink()
    preset.use("cifar10_demo")
    assert PARAMS.read_text() == capsys.readouterr().out


@pytest.mark.parametrize("name", ["digit", "", "../params"])
def test_unknown_preset_lists_those_that_there_are(place, name):
    before = PARAMS.read_bytes()
    with pytest.raises(UserError) as caught:
        preset.use(name)
    assert f"there is no preset {name!r}; choose {', '.join(NAMES)}" in str(caught.value)
    assert PARAMS.read_bytes() == before


def test_written_preset_is_replaced_and_a_changed_one_kept(place):
    preset.use("cifar10_resnet32")
    preset.use("cifar10_demo")
    changed = PARAMS.read_text().replace("gamma: 5.0", "gamma: 3.0")
    PARAMS.write_text(changed)
    with pytest.raises(UserError) as caught:
        preset.use("digits")
    for words in ("was changed and would be lost", "cp params.yaml presets/mine.yaml", "rm params.yaml"):
        assert words in str(caught.value)
    assert PARAMS.read_text() == changed
    write_own("mine", changed)  # as the message says
    write_own("broken", "gama: 1\n")
    preset.use("digits")
    preset.use("mine")
    assert PARAMS.read_text() == changed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gama: 1\n", "gama: no such key; did you mean gamma?"),
        ("resnet:\n", "resnet: is None, but it is a section"),
        ("gamma: {a: 1}\n", "gamma: is a section"),
        ("gamma: [\n", "is no valid YAML"),
    ],
)
def test_unusable_preset_is_named_and_not_put_in_place(place, text, words):
    write_own("mine", text)
    before = PARAMS.read_bytes()
    with pytest.raises(UserError, match="presets/mine") as caught:
        preset.use("mine")
    assert words in str(caught.value)
    assert PARAMS.read_bytes() == before


def test_preset_that_cannot_be_written_leaves_the_file_as_it_was(place, monkeypatch):
    before = PARAMS.read_bytes()

    def stop(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.infra.atomic_io.os.fsync", stop)
    monkeypatch.setattr(sys, "argv", ["preset", "cifar10_resnet32"])
    with pytest.raises(
        SystemExit, match=r"error: params\.yaml: No space left on device; free some space"
    ):
        preset.main()
    assert PARAMS.read_bytes() == before
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


# import


HOLDS = {"pretrain": {"policy_net": None}, "curriculum": {"resnet": None}, "finetune": {}}


def save_own(stage: str, folder: Path) -> Path:
    """A checkpoint of ours with the networks that the stage makes."""
    checkpoint.save(replace(networks(), **HOLDS[stage]), folder)
    return folder


def save_theirs(stage: str, path: Path) -> Path:
    """A checkpoint of the authors with the networks that the stage makes."""
    own = networks()
    content = {}
    if stage != "curriculum":
        content["resnet"] = staged(own.resnet)
    if stage != "pretrain":
        content["agent"] = {
            f"logit{name[2:]}" if name.startswith("fc.") else f"features.{name}": tensor
            for name, tensor in staged(own.policy_net.features).items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def staged(network: ResNet) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1:2] = [parts[1], "0"]
        weights[".".join(parts)] = tensor
    return weights


@pytest.mark.parametrize("save", [save_own, save_theirs])
@pytest.mark.parametrize(
    ("made_by", "lacking"), [("pretrain", "policy"), ("curriculum", "ResNet"), ("finetune", None)]
)
def test_checkpoint_serves_the_stages_whose_networks_it_holds(place, save, made_by, lacking):
    path = save(made_by, place / "found")
    for stage in HELD:
        if made_by in (stage, "finetune"):
            check(path, stage)
            continue
        with pytest.raises(CheckpointError, match=f"no {lacking}") as caught:
            check(path, stage)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["#a b${gamma}", "x:y\none[x]*", "!it's `x` "])
def test_copy_has_a_name_that_dvc_and_git_take_as_it_is(place, name):
    path = save_theirs("finetune", place / "downloads" / f"{name}.t7")
    target = bring_in(path)
    assert re.fullmatch(r"import/[\w.]+\.t7", str(target))
    assert target.read_bytes() == path.read_bytes()


def test_own_folder_is_copied_under_its_and_its_parents_name(place):
    folder = save_own("pretrain", place / "models" / "pretrain")
    (folder / "notes.txt").write_text("not part of it")
    target = bring_in(folder)
    assert target == Path("import/models-pretrain")
    assert sorted(path.name for path in target.iterdir()) == ["model.json", "model.safetensors"]
    for path in target.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_folder_beside_params_gets_no_name_with_a_dash(place):
    save_own("pretrain", place / "mine")
    assert not bring_in(Path("mine")).name.startswith("-")


def test_older_copy_of_the_same_folder_is_replaced(place):
    folder = save_own("pretrain", place / "models" / "pretrain")
    bring_in(folder)
    save_own("finetune", folder)
    target = bring_in(folder)
    assert (target / "model.json").read_bytes() == (folder / "model.json").read_bytes()


def test_what_is_in_import_already_stays(place):
    path = save_theirs("finetune", Path("import/ckpt.t7"))
    folder = save_own("finetune", Path("import/mine"))
    before = path.read_bytes()
    assert (bring_in(place / path), bring_in(folder)) == (path, folder)
    assert path.read_bytes() == before
    assert sorted(path.name for path in Path("import").iterdir()) == ["ckpt.t7", "mine", "none"]


def test_file_called_none_does_not_become_the_mark_of_nothing(place):
    path = save_theirs("finetune", place / "downloads" / "none")
    with pytest.raises(UserError, match=r"none.*rename"):
        bring_in(path)
    assert Path("import/none").read_bytes() == b""


@pytest.mark.parametrize(
    ("stage", "stages", "source"),
    [
        ("pretrain", ["pretrain"], "digits"),
        ("curriculum", ["curriculum"], "cifar10_resnet32_quick"),
        ("finetune", list(HELD), "digits"),
        ("finetune", list(HELD), "cifar10_resnet32_quick"),
    ],
)
def test_naming_a_checkpoint_changes_its_lines_alone(place, stage, stages, source):
    text = preset.whole_text(source)
    PARAMS.write_text(text)
    assert sorted(name_in_params(stage, Path("import/ckpt.t7"))) == sorted(stages)
    before, after = text.splitlines(), PARAMS.read_text().splitlines()
    section = ""
    for old, new in zip(before, after, strict=True):
        section = old.split(":")[0] if old[:1].isalpha() else section
        if section == "checkpoints" and old.split(":")[0].strip() in stages:
            assert new == old.replace("import/none", "import/ckpt.t7")
        else:
            assert new == old
    assert [s for s, path in named().items() if path == "import/ckpt.t7"] == stages


def test_naming_a_pair_leaves_stages_that_import_already(place):
    name_in_params("pretrain", Path("import/resnet.t7"))
    assert name_in_params("finetune", Path("import/pair.t7")) == ["finetune", "curriculum"]
    assert [named()[stage] for stage in HELD] == ["import/resnet.t7", "import/pair.t7", "import/pair.t7"]


def test_naming_a_pruned_pair_leaves_pretrain_its_whole_network(place):
    resnet = cifar_resnet(depth=8, width=4, num_classes=3, inner_channels=((4,), (8,), (8,)))
    checkpoint.save(replace(networks(), resnet=resnet), Path("import/pair"))
    assert name_in_params("finetune", Path("import/pair")) == ["finetune", "prune", "curriculum"]
    assert named()["pretrain"] == "import/none"


@pytest.fixture
def pair(place) -> Path:
    """A finetuned checkpoint of the authors, to be imported."""
    return save_theirs("finetune", place / "downloads" / "ckpt.t7")


def run_main(monkeypatch, file: Path | str, stage: str, fail: str = "") -> list[list[str]]:
    """Run the command with DVC and Git noted instead of run; what they would have done."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(list(command))
        if command[0] == fail:
            raise subprocess.CalledProcessError(255, command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["import_checkpoint", str(file), stage])
    import_checkpoint.main()
    return commands


def named() -> dict[str, str]:
    content = yaml.safe_load(PARAMS.read_text())
    return {stage: content["checkpoints"][stage] for stage in STAGES}


def test_import_copies_tracks_and_names_the_file(pair, monkeypatch, capsys):
    commands = run_main(monkeypatch, pair, "finetune")
    assert commands == [
        ["dvc", "add", "--quiet", "import/ckpt.t7"],
        ["git", "add", "import/ckpt.t7.dvc", "import/.gitignore"],
    ]
    assert Path("import/ckpt.t7").read_bytes() == pair.read_bytes()
    assert {named()[stage] for stage in HELD} == {"import/ckpt.t7"}
    assert "checkpoints.finetune in params.yaml is now import/ckpt.t7" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["", "model.safetensors", "model.json"])
def test_own_checkpoint_is_imported_by_its_folder_or_files(place, monkeypatch, file):
    save_own("pretrain", place / "models" / "pretrain")
    commands = run_main(monkeypatch, Path("models/pretrain") / file, "pretrain")
    assert commands[0][-1] == "import/models-pretrain"
    assert named()["pretrain"] == "import/models-pretrain"
    check(Path("import/models-pretrain"), "pretrain")


def test_second_file_of_the_same_name_leaves_the_first_in_place(place, monkeypatch):
    resnet = save_theirs("pretrain", place / "resnet" / "ckpt.t7")
    policy = save_theirs("curriculum", place / "policy" / "ckpt.t7")
    run_main(monkeypatch, resnet, "pretrain")
    with contextlib.suppress(SystemExit):
        run_main(monkeypatch, policy, "curriculum")
    assert Path(named()["pretrain"]).read_bytes() == resnet.read_bytes()


def nothing_changed() -> bool:
    assert [path.name for path in Path("import").iterdir()] == ["none"]
    return PARAMS.read_bytes() == (ROOT / "presets" / "digits.yaml").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "params.yaml is missing"),
        ("gamma: [", "params.yaml is no valid YAML"),
        ("gamma: 1\n", "params.yaml can't be used"),
        ("&a [*a]", "params.yaml holds list"),
    ],
)
def test_import_beside_unusable_params_copies_nothing(pair, monkeypatch, content, words):
    PARAMS.unlink() if content is None else PARAMS.write_text(content)
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, pair, "finetune")
    assert f"error: {words}" in str(caught.value)
    assert [path.name for path in Path("import").iterdir()] == ["none"]


def test_import_that_can_not_write_params_leaves_them(pair, monkeypatch):
    before = PARAMS.read_bytes()

    def stop(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(import_checkpoint, "write_text", stop)
    with pytest.raises(SystemExit, match=r"params\.yaml: No space left .*params\.yaml is as it was"):
        run_main(monkeypatch, pair, "finetune")
    assert PARAMS.read_bytes() == before


def test_program_that_is_not_there_is_named(pair, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["import_checkpoint", str(pair), "finetune"])
    monkeypatch.setenv("PATH", str(pair.parent))
    with pytest.raises(SystemExit, match="error: dvc: No such file"):
        import_checkpoint.main()
    assert set(named().values()) == {"import/none"}


def test_copy_that_stops_between_its_files_is_recognised(place, monkeypatch):
    folder = save_own("pretrain", place / "models" / "pretrain")
    target = bring_in(folder)
    save_own("finetune", folder)
    real = import_checkpoint.write_atomically

    def stop(path, content):
        if path.name == checkpoint.SIDECAR:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(import_checkpoint, "write_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        bring_in(folder)
    with pytest.raises(CheckpointError, match="damaged or of another checkpoint"):
        check(target, "pretrain")


@pytest.mark.parametrize("file", ["missing.t7", "missing/model.safetensors", "params.yaml"])
def test_file_that_is_no_checkpoint_changes_nothing(place, monkeypatch, file):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, file, "pretrain")
    assert str(caught.value).startswith("error: ")
    assert file.split("/")[0] in str(caught.value)
    assert nothing_changed()


def test_checkpoint_for_another_stage_changes_nothing(place, monkeypatch):
    path = save_theirs("curriculum", place / "ckpt.t7")
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, path, "finetune")
    assert f"error: {path} holds a policy and no ResNet" in str(caught.value)
    assert nothing_changed()


def test_unknown_stage_lists_those_that_there_are(place, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "ckpt.t7", "evaluate")
    said = capsys.readouterr().err
    assert "evaluate" in said
    assert all(stage in said for stage in STAGES)


@pytest.mark.parametrize("program", ["dvc", "git"])
def test_program_that_fails_is_named_and_params_are_left(pair, monkeypatch, program):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, pair, "finetune", fail=program)
    assert f"{program} add" in str(caught.value)
    assert set(named().values()) == {"import/none"}


def test_speed_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results/speed.json"
    monkeypatch.setattr(
        "sys.argv",
        ["speed", "--depth", "8", "--width", "8", "--kept", "0.5", "--batches", "32", "--rounds", "5",
         "--executors", "gather,triton", "--shares", "0,1", "--seconds", "60", "--out", str(out)],
    )  # fmt: skip
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    speed.main()
    found = json.loads(out.read_text())
    (answer,) = found["answers"]
    assert answer["winner"]["executor"] == "gather"
    # engines of `make peers` are left out too where they are not installed
    assert {name for name in found["left_out"] if not name.startswith(tuple(PEERS))} == {"triton fp32"}
    assert "gather is" in capsys.readouterr().out or not answer["winner"]["speedup"]["reliable"]


@pytest.mark.parametrize("prune", [0.0, 0.5])
def test_speed_makes_a_policy_of_the_kept_share(prune):
    images = torch.randint(256, (400, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte()
    arguments = argparse.Namespace(family="cifar", depth=20, width=8, keep_ratio=0.31, prune=prune)
    networks, full = speed.make_networks(arguments, images)
    assert not full.is_pruned
    assert networks.resnet.is_pruned == (prune > 0)
    actions = make_executor(networks)(images).actions.double()
    assert actions.mean(dim=0) == pytest.approx([0.31] * 9, abs=0.01)
    blocks = torch.corrcoef(actions.t()) - torch.eye(9)
    assert blocks.abs().max() < 0.5  # the decisions are not one and the same


IMAGENET = {
    "family": "imagenet", "depth": 18, "width": 64, "mean": (0.0,) * 3, "std": (1.0,) * 3,
}  # fmt: skip


def fetched(monkeypatch, name: str, **changes: object) -> Path:
    """What the tool would download, on a machine without a network."""

    def download(url, path, **options):
        assert Path(path).stem.endswith(options["hash_prefix"])
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    return import_checkpoint.download(name, ResNetParams(**(IMAGENET | changes)))


def test_weights_that_can_not_be_fetched_say_how_to_bring_them(place, monkeypatch):
    with pytest.raises(UserError, match=r"resnet18-\w+\.pth can't be fetched \(Network is unreach"):
        fetched(monkeypatch, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("IMAGENET1K_V9", {}, "resnet18 has no weights IMAGENET1K_V9; choose IMAGENET1K_V1"),
        ("IMAGENET1K_V1", {"depth": 26}, "torchvision has no resnet26; set resnet.depth"),
        ("IMAGENET1K_V1", {"family": "cifar", "depth": 32}, "no ResNets of the family cifar"),
    ],
)
def test_weights_that_torchvision_does_not_have_are_refused(place, monkeypatch, name, changes, said):
    with pytest.raises(UserError, match=said):
        fetched(monkeypatch, name, **changes)


def test_import_of_torchvisions_weights_fetches_and_names_them(place, monkeypatch):
    from torchvision.models import resnet18

    content = yaml.safe_load(PARAMS.read_text())
    content["resnet"] |= {"family": "imagenet", "depth": 18, "width": 64}
    content["benchmark"]["sole_depths"], content["sole"]["depths"] = [10], [10]
    PARAMS.write_text(yaml.safe_dump(content, sort_keys=False))

    def download(url, path, **options):
        torch.save(resnet18(num_classes=10).state_dict(), path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    commands = run_main(monkeypatch, "torchvision:IMAGENET1K_V1", "pretrain")
    (file,) = Path("import").glob("resnet18-*.pth")
    assert commands[0] == ["dvc", "add", "--quiet", str(file)]
    assert named()["pretrain"] == str(file)
