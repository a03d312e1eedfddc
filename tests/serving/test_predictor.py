"""Predictions: what the reference executor gives, in words that need no shapes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import NORMALISATION, make_split, pair_between_paths, set_dial, small_pair, trained

from pipeline.flops import measure
from pipeline.inference import native
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.masked import Masked
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.serving import predictor as module
from pipeline.serving.predictor import PredictionError, Predictor, as_colours, image_size_of

SIZE = 16
CLASSES = ("cat", "dog", "hält")


@pytest.fixture(scope="module")
def networks() -> Checkpoint:
    pair = small_pair(classes=CLASSES, image_size=SIZE)
    return replace(pair, path=Path("models/finetune"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_split(20, size=SIZE).images


def same(predictions, expected) -> bool:
    return [p.record() for p in predictions] == [p.record() for p in expected]


@pytest.mark.parametrize("channels", [None, ((4,), (3,), (8,), (1,), (8,), (16,))])
def test_predictions_are_those_of_the_reference(networks, images, channels):
    """Of a pruned network too: what both save is a share of the network before it was pruned."""
    full = measure(networks.resnet, networks.policy_net, SIZE).full
    if channels:
        pruned = trained(cifar_resnet(depth=14, width=4, num_classes=3, inner_channels=channels), seed=1)
        networks = replace(networks, resnet=pruned)
    pair = Networks(resnet=networks.resnet, policy_net=networks.policy_net, normalisation=NORMALISATION)
    expected = Masked(pair)(images)
    cost = measure(networks.resnet, networks.policy_net, SIZE)
    predictions = Predictor(networks)(images)
    assert len(predictions) == len(images)
    assert len({p.blocks for p in predictions}) > 1  # else the rest of this test proves little
    for prediction, logits, actions in zip(predictions, expected.logits, expected.actions, strict=True):
        assert prediction.name == CLASSES[int(logits.argmax())]
        assert prediction.probabilities == pytest.approx(logits.softmax(dim=0).numpy(), abs=1e-4)
        assert prediction.probabilities.sum() == pytest.approx(1)
        assert prediction.confidence == prediction.probabilities.max()
        assert prediction.kept_blocks.tolist() == actions.tolist()
        assert prediction.blocks == int(actions.sum())
        assert prediction.flops == float(cost.of(actions[None])[0])
        assert prediction.flops_saved == 1 - prediction.flops / full


@pytest.fixture
def between_paths(networks, images) -> Predictor:
    """Of a policy between paths; its dial is as fitting it would make it."""
    pair = pair_between_paths(images)
    predictor = Predictor(replace(networks, **pair))
    set_dial(pair["policy_net"].path_values, full_flops=predictor.cost.full)
    return predictor


def test_each_call_has_its_gamma_and_the_next_one_that_of_the_training(between_paths, images):
    trained = between_paths(images)
    fewest = between_paths(images, gamma=0.0)
    most = between_paths(images, gamma=1e9)
    blocks = [sum(p.blocks for p in predictions) for predictions in (fewest, trained, most)]
    assert blocks == sorted(blocks)
    assert blocks[0] < blocks[2]
    assert same(between_paths(images), trained)


def test_budget_is_turned_into_gamma_and_what_can_not_be_is_named(between_paths, networks):
    assert between_paths.gamma_of() is None
    assert between_paths.gamma_of(gamma=2.5) == 2.5
    assert between_paths.gamma_of(budget=0.6) == pytest.approx(5e5, rel=0.01)
    for given, message in [
        ({"budget": 0.95}, "budget 0.95 is out of this model's reach; it takes 0.300 to 0.900"),
        ({"budget": float("nan")}, "budget nan is out of this model's reach"),
        ({"budget": 0.5, "gamma": 2.0}, "gamma 2 and budget 0.5: give one of the two"),
        ({"gamma": -1.0}, "gamma -1.0 is no number from 0 to 1e[+]09"),
        ({"gamma": float("nan")}, "gamma nan is no number from 0 to 1e[+]09"),
    ]:
        with pytest.raises(PredictionError, match=message):
            between_paths.gamma_of(**given)
    with pytest.raises(PredictionError, match="decides block by block"):
        Predictor(networks).gamma_of(gamma=2.0)


def test_resnet_alone_runs_every_block_and_saves_nothing(networks, images):
    predictions = Predictor(replace(networks, policy_net=None))(images)
    assert all(prediction.kept_blocks.tolist() == [True] * 6 for prediction in predictions)
    assert {prediction.flops_saved for prediction in predictions} == {0.0}
    expected = networks.resnet(NORMALISATION(images)).softmax(dim=1)
    probabilities = torch.from_numpy(np.stack([prediction.probabilities for prediction in predictions]))
    assert torch.allclose(probabilities.float(), expected, atol=1e-4)


def test_arrays_and_tensors_are_the_same(networks, images):
    predict = Predictor(networks)
    frozen = images.numpy().copy()
    frozen.setflags(write=False)
    mirrored = np.ascontiguousarray(images.numpy()[:, :, ::-1])[:, :, ::-1]  # not contiguous
    for given in (images.numpy(), frozen, mirrored):
        assert same(predict(given), predict(images))
    assert predict(images[:0]) == []


def test_more_images_than_a_batch_holds_are_predicted_in_parts(networks, images, monkeypatch):
    predict = Predictor(networks)
    whole = predict(images)
    monkeypatch.setattr(module, "evaluation_batch", lambda image_size: 7)
    for prediction, other in zip(predict(images), whole, strict=True):
        assert prediction.kept_blocks.tolist() == other.kept_blocks.tolist()
        assert prediction.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_threads_may_share_a_predictor(networks, images):
    predict = Predictor(networks)
    parts = [images[start : start + 1 + start % 4] for start in range(16)]
    expected = [predict(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        predictions = list(pool.map(predict, parts * 5))
    assert all(same(*pair) for pair in zip(predictions, expected * 5, strict=True))


def test_record_is_plain_json(networks, images):
    prediction = Predictor(networks)(images[:1])[0]
    assert json.loads(json.dumps(prediction.record())) == {
        "class": prediction.name,
        "confidence": prediction.confidence,
        "probabilities": list(prediction.probabilities),
        "kept_blocks": list(prediction.kept_blocks),
        "blocks": prediction.blocks,
        "flops": prediction.flops,
        "flops_saved": prediction.flops_saved,
    }


@pytest.mark.parametrize(
    ("change", "shown", "remedy"),
    [
        (lambda images: images[:, :8], "uint8 (20, 8, 16, 3)", "scale them to 16 x 16 pixels"),
        (lambda images: images[0], "uint8 (16, 16, 3)", "images[None]"),
        (lambda images: images[..., :1], "uint8 (20, 16, 16, 1)", "three times"),
        (lambda images: images.permute(0, 3, 1, 2), "uint8 (20, 3, 16, 16)", "channels last"),
        (lambda images: images / 255, "float32 (20, 16, 16, 3)", "float32 is not cast"),
        (lambda images: images > 99, "bool (20, 16, 16, 3)", "bool is not cast"),
        (lambda images: images.numpy().astype(int), "int64 (20, 16, 16, 3)", "int64 is not cast"),
        (lambda images: images.numpy().astype(object), "object (20, 16, 16, 3)", "object is not cast"),
    ],
)
def test_other_images_are_refused_with_what_is_expected(networks, images, change, shown, remedy):
    with pytest.raises(PredictionError) as caught:
        Predictor(networks)(change(images))
    message = str(caught.value)
    assert f"images are {shown}, expected uint8 [B, 16, 16, 3]" in message
    assert remedy in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answer_that_is_no_number_is_refused(networks, images, monkeypatch, value):
    predict = Predictor(networks)
    execute = predict._execute

    def overflowing(images):
        output = execute(images)
        logits = output.logits.clone()
        logits[-1, 0] = value
        return replace(output, logits=logits)

    overflowing.device = execute.device
    monkeypatch.setattr(predict, "_execute", overflowing)
    with pytest.raises(PredictionError, match=r"logits are NaN or infinite.*train it again"):
        predict(images)


def test_policy_network_alone_is_refused(networks):
    with pytest.raises(CheckpointError, match=r"models/finetune holds no ResNet.*take models/finetune"):
        Predictor(replace(networks, resnet=None))


def test_image_size_is_the_checkpoints_or_that_which_is_told(networks, images):
    older = replace(networks, image_size=None)
    assert same(Predictor(older, image_size=SIZE)(images), Predictor(networks)(images))
    assert image_size_of(networks, SIZE) == SIZE
    with pytest.raises(PredictionError, match=r"models/finetune is older.*`--image-size`"):
        Predictor(older)
    with pytest.raises(PredictionError, match="images of 16 x 16 pixels, not 32; leave the size out"):
        Predictor(networks, image_size=32)
    for size in (0, 4, 18, 516):
        with pytest.raises(PredictionError, match=f"size {size} is no multiple of 4 from 8 to 512"):
            Predictor(older, image_size=size)


def test_prediction_as_text_shows_blocks_in_their_order(networks, images):
    (prediction,) = Predictor(networks)(images[:1])
    prediction = replace(prediction, kept_blocks=np.array([True, False, False, True]), flops_saved=0.25)
    assert str(prediction).endswith("%, #..# 2 of 4 blocks, 25.0 % of the FLOPs saved")


# where a logged model, which is no checkout, keeps what it compiles


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """This package's code as if it lay in a logged model; its folder."""
    try:
        built = native.library()._name  # not compiled again below
    except UnavailableError as error:
        pytest.skip(str(error))

    def build(compiler: str, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr(native, "FOLDER", tmp_path / "model" / "code" / "pipeline" / "executors")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    native.library.cache_clear()
    yield tmp_path / "model"
    native.library.cache_clear()


def test_shipped_code_compiles_into_the_users_cache(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Path(native.library()._name).parent == tmp_path / "cache" / "blockdrop"
    assert not shipped.exists()


@pytest.mark.parametrize("lacking", ["cache", "home"])
def test_shipped_code_compiles_for_its_process_without_a_cache(shipped, tmp_path, monkeypatch, lacking):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if lacking == "home":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = Path(native.library()._name).parent
    assert folder.name.startswith("blockdrop-")
    assert folder.stat().st_mode & 0o077 == 0  # nobody else puts a library there
    assert not shipped.exists()


@pytest.mark.parametrize(("number", "dtype"), [(5, object), (5.0, None)])
def test_single_number_is_refused(number, dtype):
    with pytest.raises(PredictionError, match="a single number is no batch of images"):
        as_colours(np.array(number, dtype=dtype))
