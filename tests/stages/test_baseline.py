"""baseline: every static rival is measured as it is, and only those that params.yaml names."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from builders import NORMALISATION, trained
from repository_copy import TINY, Copy, changed, make_copy, make_workplace, ran

from pipeline.config import Params
from pipeline.data.dataset import load_split
from pipeline.device import generator
from pipeline.flops import measure
from pipeline.inference.predict import logits_under, predict
from pipeline.models import checkpoint
from pipeline.models.averaging import AveragedAnswers
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from stages import baseline

CPU = torch.device("cpu")
BLOCKS = 6  # of the tiny ResNet-14


def put(folder, name: str, depth: int | None, seed: int = 0) -> ResNet | None:
    """A checkpoint with weights that tell the classes somewhat apart; depth None: with no network."""
    torch.manual_seed(seed)
    resnet = trained(cifar_resnet(depth=depth, width=4, num_classes=3)) if depth else None
    made = checkpoint.Checkpoint(
        stage="test",
        resnet=resnet,
        policy_net=None,
        normalisation=NORMALISATION,
        image_size=8,
        classes=("dark", "grey", "light"),
        metrics={},
    )
    checkpoint.save(made, folder / "models" / name)
    return resnet


def workplace(folder, patch: pytest.MonkeyPatch) -> Params:
    """A workplace with all networks that the parameters name, and others that they don't."""
    made = make_workplace(folder, changes=TINY)
    put(folder, "pretrain", 14, 0)
    put(folder, "prune", 14, 0)
    put(folder, "policy_pretrain", None)
    put(folder, "sole/8", 8, 1)
    for seed, rule in enumerate(made.static.rules):
        put(folder, f"static/{rule}-3", 14, 2 + seed)
    put(folder, "sole/20", 20, 9)
    (folder / "models/static/first-5").mkdir()  # left by an earlier params.yaml, and broken
    (folder / "metrics/times").mkdir(parents=True)
    (folder / "metrics/times/pretrain.json").write_text('{"seconds": 12.5}')
    patch.chdir(folder)
    patch.setenv("DVC_ROOT", str(folder))
    patch.setenv("BLOCKDROP_TRACKING", "off")
    patch.setenv("BLOCKDROP_DEVICE", "cpu")
    return made


@pytest.fixture
def params(tmp_path, monkeypatch) -> Params:
    return workplace(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A workplace in which the stage was run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        baseline.main(workplace(folder, patch))
    return folder


def rows(folder, name: str) -> list[dict[str, str]]:
    with (folder / "plots/baseline" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def curve(folder, kind: str, finetuned: int) -> dict[int, dict[str, float]]:
    """Rows of one kind by their number of blocks."""
    return {
        int(row["blocks"]): {key: float(row[key]) for key in ("flops", "accuracy", "accuracy_std")}
        for row in rows(folder, "curves.csv")
        if row["kind"] == kind and int(row["finetuned"]) == finetuned
    }


def test_it_measures_what_params_yaml_names_and_no_stale_folder(measured):
    found = json.loads((measured / "metrics/baseline.json").read_text())
    assert set(found["baseline"]) == {"accuracy", "loss", "flops", "num_blocks"}
    assert set(found["sole"]) == {"8"}
    assert set(found["static"]) == {"first_3", "random_3", "distribute_3"}
    assert all(set(values) == {"accuracy", "flops", "blocks"} for values in found["static"].values())
    table = rows(measured, "curves.csv")
    assert set(table[0]) == {
        "name", "kind", "depth", "blocks", "finetuned", "flops", "accuracy", "accuracy_std",
    }  # fmt: skip
    assert len(table) == 1 + 1 + 3 + 3 * (BLOCKS + 1)
    assert list(rows(measured, "images.csv")[0]) == [
        "image", "full", "sole-8", "first-3", "random-3", "distribute-3",
    ]  # fmt: skip
    times = json.loads((measured / "metrics/times/baseline.json").read_text())
    assert times["train_seconds"] == 12.5


@pytest.mark.parametrize(("images", "draws"), [(1, 5), (2_500, 4), (5_000, 2), (50_000, 2)])
def test_a_large_test_set_takes_few_random_draws(images, draws):
    assert baseline.random_draws(images) == draws


def test_a_pruned_network_is_measured_with_every_block(params, tmp_path):
    torch.manual_seed(0)
    channels = ((4,), (4,), (8,), (8,), (8,), (8,))
    resnet = trained(cifar_resnet(depth=14, width=4, num_classes=3, inner_channels=channels))
    before = checkpoint.load(tmp_path / "models/prune")
    checkpoint.save(replace(before, resnet=resnet), tmp_path / "models/prune")
    baseline.main(params)
    found = json.loads((tmp_path / "metrics/baseline.json").read_text())
    cost = measure(resnet, None, 8)
    assert found["pruned"]["every_block"]["flops"] == cost.every_block < cost.full
    assert found["baseline"]["flops"] == cost.full
    (row,) = (row for row in rows(tmp_path, "curves.csv") if row["kind"] == "pruned")
    correct = [int(image["pruned"]) for image in rows(tmp_path, "images.csv")]
    assert float(row["accuracy"]) == pytest.approx(sum(correct) / len(correct))


def test_random_blocks_are_the_mean_and_deviation_of_all_draws(params, tmp_path, monkeypatch):
    """With a network that is right where the first block runs: draws differ in that share."""
    monkeypatch.setattr(
        baseline, "correct_under", lambda _, __, policies, *, normalisation: policies[..., 0]
    )
    baseline.main(params)
    resnet = checkpoint.load(tmp_path / "models/pretrain").need_resnet()
    count = len(load_split(tmp_path / "data/prepared", "test", CPU))
    draw = generator(params.seed, "baseline")
    noise = torch.rand(baseline.random_draws(count), count, BLOCKS, generator=draw)
    for kept in (1, 3, 5):
        actions = noise.argsort(dim=2).argsort(dim=2) < kept
        shares = actions[:, :, 0].double().mean(dim=1)
        assert len(set(shares.tolist())) > 1  # else one draw would do
        flops = torch.stack([measure(resnet, None, 8).of(drawn) for drawn in actions])
        found = curve(tmp_path, "random", 0)[kept]
        assert found["accuracy"] == pytest.approx(float(shares.mean()))
        assert found["accuracy_std"] == pytest.approx(float(shares.std()))
        assert found["flops"] == pytest.approx(float(flops.mean()))


def test_numbers_are_those_of_the_networks_alone(measured):
    found = json.loads((measured / "metrics/baseline.json").read_text())
    test = load_split(measured / "data/prepared", "test", CPU)
    images = rows(measured, "images.csv")
    assert [int(row["image"]) for row in images] == list(range(len(test)))
    first_three = torch.tensor([[True] * 3 + [False] * 3]).expand(len(test), -1)
    one_a_stage = torch.tensor([[True, False] * 3]).expand(len(test), -1)
    for column, (section, key), folder, actions in [
        ("full", ("baseline", None), "pretrain", None),
        ("sole-8", ("sole", "8"), "sole/8", None),
        ("first-3", ("static", "first_3"), "static/first-3", first_three),
        ("distribute-3", ("static", "distribute_3"), "static/distribute-3", one_a_stage),
    ]:
        resnet = checkpoint.load(measured / "models" / folder).need_resnet()
        expected = predict(resnet, test, actions, normalisation=NORMALISATION)
        assert [row[column] == "1" for row in images] == expected.correct.tolist()
        cost = measure(resnet, None, 8)
        told = found[section] if key is None else found[section][key]
        assert told["accuracy"] == pytest.approx(expected.accuracy)
        assert told["flops"] == (cost.full if actions is None else float(cost.of(actions)[0]))


def test_a_policy_network_that_classifies_is_averaged_with_each_network_but_random_blocks(
    params, tmp_path
):
    small = put(tmp_path, "policy_pretrain", 8, 20)
    baseline.main(params)
    found = json.loads((tmp_path / "metrics/baseline.json").read_text())
    assert set(found["ensemble"]) == {"sole_8", "first_3", "distribute_3"}
    validation, test = (
        load_split(tmp_path / "data/prepared", name, CPU) for name in ("validation", "test")
    )
    first_three = torch.tensor([[True] * 3 + [False] * 3])
    for key, folder, policy in [
        ("sole_8", "sole/8", torch.ones(1, 3, dtype=torch.bool)),
        ("first_3", "static/first-3", first_three),
    ]:
        other = checkpoint.load(tmp_path / "models" / folder).need_resnet()
        average = AveragedAnswers()
        of_small, of_other = (
            {
                split: logits_under(resnet, split, mask, normalisation=NORMALISATION)
                for split in (validation, test)
            }
            for resnet, mask in ((small, torch.ones(1, 3, dtype=torch.bool)), (other, policy))
        )
        average.fit(of_small[validation][0], of_other[validation], validation.labels)
        correct = average(of_small[test][0], of_other[test][0]).argmax(dim=1) == test.labels
        told = found["ensemble"][key]
        assert told["accuracy"] == pytest.approx(float(correct.double().mean()))
        cost = measure(other, None, 8).of(policy)[0]
        assert told["flops"] == float(cost) + measure(small, None, 8).full
        column = f"ensemble-{key.replace('_', '-')}"
        written = [row[column] == "1" for row in rows(tmp_path, "images.csv")]
        assert written == correct.tolist()


def test_curves_run_from_no_block_to_the_full_network(measured):
    full = json.loads((measured / "metrics/baseline.json").read_text())["baseline"]
    kinds = {kind: curve(measured, kind, 0) for kind in ("first", "random", "distribute")}
    assert all(list(found) == list(range(BLOCKS + 1)) for found in kinds.values())
    for found in kinds.values():
        assert found[BLOCKS]["accuracy"] == full["accuracy"]
        assert found[BLOCKS]["flops"] == full["flops"]
        assert found[0] == kinds["first"][0]
        flops = [found[kept]["flops"] for kept in range(BLOCKS + 1)]
        assert flops == sorted(flops)
    assert all(row["accuracy_std"] == 0 for row in kinds["first"].values())
    (whole,) = curve(measured, "full", 0).items()
    assert whole == (BLOCKS, kinds["first"][BLOCKS])


def test_the_same_networks_give_the_same_bytes(params, measured, tmp_path):
    def files(folder) -> dict[str, bytes]:
        written = [*(folder / "plots/baseline").iterdir(), folder / "metrics/baseline.json"]
        return {file.name: file.read_bytes() for file in written}

    baseline.main(params)
    assert files(tmp_path) == files(measured)
    baseline.main(params.model_copy(update={"seed": 1}))
    assert files(tmp_path)["curves.csv"] != files(measured)["curves.csv"]


def test_a_missing_network_is_named(params, tmp_path):
    shutil.rmtree(tmp_path / "models/static/random-3")
    with pytest.raises(checkpoint.CheckpointError, match="models/static/random-3"):
        baseline.main(params)


ONE_OF_EACH = TINY | {"static": {"rules": ["distribute"], "num_kept": [2]}}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return make_copy(tmp_path_factory.mktemp("copy"), changes=ONE_OF_EACH)


@pytest.fixture
def repro(copy, monkeypatch) -> Callable[..., set[str]]:
    """What `dvc repro baseline` runs with changes to the parameters of the copy."""
    monkeypatch.setenv("BLOCKDROP_TRACKING", "off")

    def run(changes: dict[str, dict], *options: str) -> set[str]:
        sections = ONE_OF_EACH.keys() | changes.keys()
        merged = {name: ONE_OF_EACH.get(name, {}) | changes.get(name, {}) for name in sections}
        text = yaml.safe_dump(changed(merged), sort_keys=False)
        (copy.folder / "params.yaml").write_text(text)
        return set(ran(copy.run("dvc", "repro", *options, "baseline")))

    return run


@pytest.mark.e2e
def test_what_was_trained_once_is_not_trained_again(copy, repro):
    assert repro({}) == {
        "check", "prepare", "pretrain", "prune", "policy_pretrain", "sole@8", "static@distribute-2",
        "baseline",
    }  # fmt: skip
    # one more depth, one more number of blocks: these alone
    more = {"sole": {"depths": [8, 20]}, "static": {"num_kept": [2, 4]}}
    assert repro(more) == {"check", "sole@20", "static@distribute-4", "baseline"}
    assert set(copy.metrics("baseline")["sole"]) == {"8", "20"}
    assert repro(more) == set()
    # one fewer: nothing is trained, and what is left behind is not read
    assert repro({"sole": {"depths": [20]}}) == {"check", "baseline"}
    assert (copy.folder / "models/sole/8").is_dir()
    assert set(copy.metrics("baseline")["sole"]) == {"20"}
    assert set(copy.metrics("baseline")["static"]) == {"distribute_2"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("changes", "trained_again"),
    [
        ({"finetune_policy": {"alpha": 0.7, "entropy_coef": 0.5, "lr": 0.01},
          "curriculum": {"gamma": 3.0}, "policy_net": {"input_size": 8}}, set()),
        ({"checkpoints": {"pretrain": "stages"}}, {"pretrain"}),
        ({"resnet": {"depth": 26, "width": 4}, "curriculum": {"epochs": 9}}, {"pretrain"}),
        ({"finetune": {"lr": 0.01}}, {"static@distribute-2"}),
        ({"pretrain": {"lr": 0.2}}, {"pretrain", "sole@8"}),
        ({"policy_net": {"width": 8}}, {"policy_pretrain"}),
        ({"augmentation": {"flip": True}},
         {"pretrain", "prune", "policy_pretrain", "sole@8", "static@distribute-2"}),
        ({"prune": {"ratio": 0.5}}, {"prune"}),
    ],
)  # fmt: skip
def test_what_makes_a_rival_train_again(repro, changes, trained_again):
    """A dry run tells what changed itself; that `static` follows a new pretrain is DVC's to know."""
    assert repro(changes, "--dry") - {"check", "baseline"} == trained_again
