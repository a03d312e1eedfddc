"""Models in MLflow: logged once, loaded and served anywhere with equal answers, promoted by an alias."""

import ast
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from builders import (
    NORMALISATION,
    TRACKING_VARIABLES,
    enter_project,
    make_split,
    pair_between_paths,
    small_pair,
)
from imports import closure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.pyfunc import scoring_server
from PIL import Image

from pipeline.inference import native
from pipeline.inference.base import UnavailableError
from pipeline.models import checkpoint
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, Checkpoint, CheckpointError
from pipeline.serving.predictor import PredictionError, Predictor
from pipeline.tracking import registry
from pipeline.tracking.model_card import model_card
from pipeline.tracking.registry import ModelError, fetched, log_model, promote
from pipeline.tracking.store import store
from tools import predict
from tools import promote as command

ROOT = Path(__file__).parents[2]
SIZE = 8
PARENT = {"blockdrop.role": "parent"}


def networks(seed: int = 0, image_size: int | None = SIZE) -> Checkpoint:
    return small_pair(classes=("cat", "dog", "hält"), image_size=image_size, seed=seed)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The project folder of all tests here: a fresh store takes seconds to set up."""
    with contextlib.suppress(UnavailableError):
        native.library()  # from the checkout, rather than compiled anew for this folder
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    enter_project(home, monkeypatch)


@pytest.fixture
def client() -> MlflowClient:
    with store() as (client, _):
        return client


@pytest.fixture
def start(client, request):
    """Make a parent run of an experiment of that name, with parameters and metrics; its id."""

    def start(name: str = request.node.name, tags=PARENT, metrics=None) -> str:
        with store() as (_, experiment_id):
            run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        points = [Metric(key, value, 1000, 0) for key, value in (metrics or {}).items()]
        client.log_batch(run_id, params=[Param("gamma", "5")], metrics=points)
        return run_id

    return start


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoint.save(networks(), tmp_path / "finetune")
    return tmp_path / "finetune"


@pytest.fixture
def images() -> np.ndarray:
    return make_split(6, size=SIZE).images.numpy()


@pytest.fixture
def registered(request) -> str:
    """A name of its own in the registry."""
    return request.node.name.replace("[", "-").rstrip("]")


# logging


def store_run(run_id: str) -> Run:
    with store() as (client, _):
        return client.get_run(run_id)


def values_of(metrics) -> dict[str, float]:
    return {metric.key: metric.value for metric in metrics}


def records(folder: Path, images: np.ndarray) -> list[dict]:
    return [prediction.record() for prediction in Predictor(checkpoint.load(folder))(images)]


def test_model_says_where_it_came_from(client, start, folder):
    run_id = start()
    model = client.get_logged_model(log_model(run_id, folder, dvc_md5="abc"))
    assert (model.name, model.status, model.source_run_id) == ("blockdrop", "READY", run_id)
    assert model.params == {"gamma": "5"}
    sha256 = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))["weights_sha256"]
    assert model.tags["dvc.md5"] == "abc"
    assert model.tags["blockdrop.stage"] == "finetune"
    assert model.tags["blockdrop.weights_sha256"] == sha256
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]
    with fetched(f"models:/{model.model_id}") as fetched_folder:
        for name in (WEIGHTS, SIDECAR):
            assert (fetched_folder / name).read_bytes() == (folder / name).read_bytes()


def test_model_has_the_metrics_of_its_run_but_no_learning_curves(client, start, folder):
    run_id = start(metrics={"accuracy": 0.75, "loss": 0.5})
    points = [Metric("finetune/loss", 1 / step, 1000, step) for step in (1, 2)]
    client.log_batch(run_id, metrics=points)
    metrics = client.get_logged_model(log_model(run_id, folder)).metrics
    assert values_of(metrics) == {"accuracy": 0.75, "loss": 0.5}
    assert {metric.timestamp for metric in metrics} == {1000}
    for name, count in (("accuracy", 1), ("finetune/loss", 2)):  # the run has no point twice
        assert len(client.get_metric_history(run_id, name)) == count


def test_model_card_says_what_people_ask(client, start, folder, registered):
    metrics = {
        "accuracy": 0.9, "full_accuracy": 0.95, "blocks_mean": 3.5, "num_blocks": 6, "mflops_mean": 1.25,
        "full_mflops": 2.5, "flops_share": 0.5, "data.train_images": 1149, "data.test_images": 450,
    }  # fmt: skip
    run_id = start(metrics=metrics)
    client.set_tag(run_id, "git.commit", "c0ffee")
    model = client.get_logged_model(log_model(run_id, folder, dvc_md5="abc"))
    card = model.tags["mlflow.note.content"]
    for part in (
        "# BlockDrop: ResNet-14", "6 blocks", "was 5.", "cat, dog, hält",
        "1,149 training, 450 test images of 8 x 8 pixels",
        "| BlockDrop | 90.00 % (86.88 to 92.44) | 3.50 | 1.25 |", "50.0 %",
        "numpy.zeros((1, 8, 8, 3), numpy.uint8)", "## Limits", "MIT", "Commit c0ffee", run_id, "abc",
    ):  # fmt: skip
        assert part in card
    assert "budget" not in card  # this policy decides block by block
    location = Path(model.artifact_location.removeprefix("file://"))
    assert (location / "README.md").read_text(encoding="utf-8") == card
    promote(run_id, registered_name=registered)
    assert client.get_model_version(registered, "1").description == card
    assert "residual blocks of a ResNet" in client.get_registered_model(registered).description


def test_model_card_of_a_policy_between_paths_and_of_many_classes_names_what_they_have(start, folder):
    pair = pair_between_paths(torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8))
    run = store_run(start())
    card = model_card(replace(networks(), **pair, classes=("a_b", "*c*", "d")), run)
    assert '"params": {"budget": 0.4}' in card
    assert r"a\_b, \*c\*, d" in card
    assert "one of a few paths" in card
    many = replace(networks(), classes=tuple(f"class {'x' * 500} {i}" for i in range(1000)))
    assert len(model_card(many, run)) <= 5000  # what MLflow takes
    alone = replace(networks(), policy_net=None)
    assert "every block runs" in model_card(alone, run)


def test_description_that_someone_wrote_is_kept(client, start, folder, registered):
    run_id = start()
    model = client.get_logged_model(log_model(run_id, folder))
    client.create_registered_model(registered, description="ours")
    for text, kept in (("mine", "mine"), (None, model.tags["mlflow.note.content"])):
        client.create_model_version(
            registered, model.artifact_location, run_id, model_id=model.model_id, description=text
        )
        version = promote(run_id, registered_name=registered).version
        assert client.get_model_version(registered, str(version)).description == kept
        client.delete_model_version(registered, str(version))
    assert client.get_registered_model(registered).description == "ours"


def test_same_weights_are_one_model_to_which_metrics_are_added(client, start, folder):
    run_id = start(metrics={"accuracy": 0.75})
    first = log_model(run_id, folder)
    before = client.get_run(run_id).to_dictionary()
    assert log_model(run_id, folder) == first
    assert client.get_run(run_id).to_dictionary() == before
    assert len(client.get_logged_model(first).metrics) == 1


def test_metrics_that_come_later_are_linked_to_the_same_model(client, start, folder):
    run_id = start(metrics={"accuracy": 0.75})
    first = log_model(run_id, folder)
    client.log_metric(run_id, "flops", 4.0)
    assert log_model(run_id, folder) == first
    metrics = client.get_logged_model(first).metrics
    assert values_of(metrics) == {"accuracy": 0.75, "flops": 4.0}
    assert len(metrics) == 2


def test_newest_of_the_models_of_a_run_is_promoted(start, folder, tmp_path, registered):
    checkpoint.save(networks(seed=1), tmp_path / "other")
    run_id = start()
    ids = [log_model(start(), folder), log_model(run_id, folder), log_model(run_id, tmp_path / "other")]
    assert len(set(ids)) == 3
    assert promote(run_id, registered_name=registered).model_id == ids[-1]


def test_unfinished_model_of_a_killed_process_is_logged_anew(client, start, folder, monkeypatch):
    run_id = start()

    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", die)
        with pytest.raises(KeyboardInterrupt):
            log_model(run_id, folder)
    model_id = log_model(run_id, folder)
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    assert [(model.model_id, model.status) for model in models] == [(model_id, "READY")]


def test_logging_leaves_mlflow_as_it_was(start, folder, capfd):
    def state() -> list[object]:
        level = logging.getLogger("mlflow").level
        return [mlflow.get_tracking_uri(), level, dict(os.environ), list(sys.path)]

    run_id = start()
    before = state()
    capfd.readouterr()
    log_model(run_id, folder)
    assert before == state()
    assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")


def test_size_of_an_older_checkpoint_is_its_examples_or_its_runs(
    client, start, folder, tmp_path, images
):
    checkpoint.save(networks(image_size=None), tmp_path)
    run_id = start()
    with pytest.raises(PredictionError, match="is older and does not say"):
        log_model(run_id, tmp_path)
    with fetched(f"models:/{log_model(run_id, tmp_path, example=images)}") as fetched_folder:
        assert checkpoint.load(fetched_folder).image_size == SIZE
    run_id = start()
    client.log_param(run_id, "data.image_size", "12")
    with fetched(f"models:/{log_model(run_id, tmp_path)}") as fetched_folder:
        assert checkpoint.load(fetched_folder).image_size == 12
    with pytest.raises(PredictionError, match="images of 8 x 8 pixels, not 12"):
        log_model(start(), folder, example=np.zeros((2, 12, 12, 3), np.uint8))


@pytest.mark.parametrize("left_out", ["resnet", "weights"])
def test_checkpoint_that_can_not_predict_is_not_logged(client, start, folder, left_out):
    if left_out == "resnet":
        checkpoint.save(replace(networks(), resnet=None), folder)
    else:
        (folder / WEIGHTS).unlink()
    run_id = start()
    with pytest.raises(CheckpointError, match=str(folder)):
        log_model(run_id, folder)
    experiment = client.get_run(run_id).info.experiment_id
    assert not client.search_logged_models([experiment], f"source_run_id = '{run_id}'")


# loading


def loaded(client: MlflowClient, model_id: str) -> mlflow.pyfunc.PyFuncModel:
    """A model from the store that its user names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        return mlflow.pyfunc.load_model(f"models:/{model_id}")


def test_loaded_model_answers_as_the_predictor_does(client, start, folder, images):
    model = loaded(client, log_model(start(), folder, example=images))
    expected = records(folder, images)
    assert model.predict(images).to_dict(orient="records") == expected
    assert model.metadata.metadata["images"] == f"[B, {SIZE}, {SIZE}, 3], whole numbers 0 to 255"
    assert model.metadata.signature.outputs.input_names() == list(expected[0])
    assert model.metadata.metadata["classes"] == ["cat", "dog", "hält"]
    assert np.array_equal(model.input_example, images[:2])
    assert model.predict(model.input_example).to_dict(orient="records") == expected[:2]


def serve(home: Path, served: Checkpoint, name: str) -> Callable[..., tuple[int, Any]]:
    """What `mlflow models serve` does with JSON, without the server: status and answer."""
    with pytest.MonkeyPatch.context() as patch:
        enter_project(home, patch)
        checkpoint.save(served, home / name)
        with store() as (client, experiment_id):
            run_id = client.create_run(experiment_id, run_name=name).info.run_id
        model = loaded(client, log_model(run_id, home / name))
    schema = model.metadata.get_input_schema()

    def answer(values: object, key: str = "inputs", **more: object) -> tuple[int, Any]:
        text = json.dumps({key: values, **more})
        try:
            given = scoring_server.invocations(text, "application/json", model, schema)
        except mlflow.exceptions.MlflowException as error:
            return error.get_http_status_code(), error.message.rpartition("Error: ")[2]
        return given.status, json.loads(given.response)["predictions"]

    return answer


@pytest.fixture(scope="module")
def server_of(home):
    return serve(home, networks(), "served")


def test_each_request_to_a_policy_between_paths_has_its_gamma(home, images):
    pair = pair_between_paths(torch.from_numpy(images))
    answer = serve(home, replace(networks(), **pair), "between-paths")

    def blocks(**params: float) -> int:
        status, rows = answer(images.tolist(), params=params)
        assert status == 200, rows
        return sum(row["blocks"] for row in rows)

    assert blocks(gamma=0) < blocks(gamma=1e9)
    assert answer(images.tolist()) == answer(images.tolist(), params={"gamma": 1000.0})  # its training's
    status, message = answer(images.tolist(), params={"budget": 7.0})
    assert (status, message[:33]) == (400, "budget 7 is out of this model's r")
    status, message = answer(images.tolist(), params={"gamma": "five"})
    assert status == 400
    assert "gamma" in message


WHOLE = "they are whole numbers 0 to 255: multiply images in 0 to 1 by 255"


def with_one(images: np.ndarray, value: object) -> list:
    changed = images.tolist()
    changed[0][0][0][0] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x / 255).tolist(), f"; {WHOLE}"),  # which was answered as black
        (lambda x: (x > 99).astype(float).tolist(), f"the largest colour of an image is 1.0; {WHOLE}"),
        (lambda x: (x > 99).tolist(), f"colours are of type bool; {WHOLE}"),
        (lambda x: with_one(x, True), f"colours are of type bool; {WHOLE}"),
        (lambda x: with_one(x, "7"), f"colours are of type str; {WHOLE}"),
        (lambda x: with_one(x, None), f"colours are of type NoneType; {WHOLE}"),
        (lambda x: with_one(x, 7.5), f"a colour is 7.5; {WHOLE}"),
        (lambda x: with_one(x, 256), f"a colour is 256; {WHOLE}"),
        (lambda x: with_one(x, -1), f"a colour is -1; {WHOLE}"),
        (lambda x: with_one(x, 10**30), f"a colour is {10**30}; {WHOLE}"),
        (lambda x: with_one(x, float("nan")), f"a colour is nan; {WHOLE}"),
        (lambda x: with_one(x, float("inf")), f"a colour is inf; {WHOLE}"),
        (lambda x: with_one(x, [1, 2]), "images differ in size"),
        (lambda x: [x[0].tolist(), x[0, :4].tolist()], "images differ in size"),
        (lambda x: [], ""),  # in MLflow's words
        (lambda x: [[]], "there is no image in (1, 0)"),
        (lambda x: x[:, :4].tolist(), "scale them to 8 x 8 pixels first"),
        (lambda x: x.transpose(0, 3, 1, 2).tolist(), "put the channels last: images.transpose"),
        (lambda x: x[..., [0, 1, 2, 2]].tolist(), "leave out alpha: images[..., :3]"),
        (lambda x: "a", ""),
        (lambda x: {"a": 1}, ""),
    ],
)
def test_server_casts_nothing(server_of, images, change, message):
    status, answer = server_of(change(images), "inputs")
    assert status == 400
    assert message in answer


@pytest.mark.parametrize(("key", "form"), [("inputs", int), ("instances", float)])
def test_server_takes_whole_numbers_however_json_writes_them(server_of, home, images, key, form):
    expected = records(home / "served", images)
    assert server_of(images.astype(form).tolist(), key) == (200, expected)


@pytest.mark.parametrize(
    "uri", ["models:/m-nothing", "models:/nothing@champion", "models:/nothing/1", "models:/"]
)
def test_model_that_is_not_there_is_said_with_its_store(home, uri):
    with pytest.raises(ModelError) as caught, fetched(uri):
        pass
    assert f"{uri} is not in sqlite:///{home}/mlflow.db" in str(caught.value)
    assert "models:/NAME@ALIAS" in str(caught.value)


def test_model_of_another_kind_is_refused(client, start, registered):
    experiment = client.get_run(start()).info.experiment_id
    other = client.create_logged_model(experiment, "other")
    with (
        pytest.raises(ModelError, match="holds no artifacts/checkpoint"),
        fetched(f"models:/{other.model_id}"),
    ):
        pass


# the registry


def test_promoting_makes_a_version_and_names_it(client, start, folder, registered, images):
    run_id = start("first")
    model_id = log_model(run_id, folder)
    promotion = promote(run_id, registered_name=registered)
    assert (promotion.version, promotion.previous, promotion.model_id) == (1, None, model_id)
    assert (promotion.run_id, promotion.run_name) == (run_id, "first")
    version = client.get_model_version_by_alias(registered, "champion")
    assert (int(version.version), version.run_id) == (1, run_id)
    tag = client.get_logged_model(model_id).tags["mlflow.modelVersions"]
    assert json.loads(tag) == [{"name": registered, "version": version.version}]
    expected = records(folder, images)
    for uri in (promotion.uri, f"models:/{registered}/1"):
        with fetched(uri) as fetched_folder:
            assert records(fetched_folder, images) == expected


def test_champion_changes_and_the_one_before_is_told(client, start, folder, registered):
    for number, before in ((1, None), (2, 1)):
        run_id = start(f"{registered}-{number}")
        log_model(run_id, folder)
        promotion = promote(f"{registered}-{number}", registered_name=registered)
        assert (promotion.version, promotion.previous, promotion.run_id) == (number, before, run_id)
    back = promote(f"{registered}-1", registered_name=registered)
    assert (back.version, back.previous) == (1, 2)
    again = promote(f"{registered}-1", registered_name=registered)
    assert (again.version, again.previous) == (1, 1)
    other = promote(f"{registered}-1", registered_name=registered, alias="candidate")
    assert (other.version, other.previous) == (1, None)
    assert len(client.search_model_versions(f"name = '{registered}'")) == 2


def test_version_that_someone_made_in_the_ui_is_taken(client, start, folder, registered):
    run_id = start()
    model_id = log_model(run_id, folder)
    client.create_registered_model(registered)
    location = client.get_logged_model(model_id).artifact_location
    client.create_model_version(registered, location, run_id, model_id=model_id)
    assert promote(run_id, registered_name=registered).version == 1


def test_unknown_run_names_the_nearest(start):
    start("gamma-25-seed-0")
    for name in ("it's", "a" * 32, "x %"):
        with pytest.raises(ModelError, match="no run has the id"):
            promote(name)
    with pytest.raises(ModelError, match=r"the name 'gamma-25-sed-0'; there are gamma-25-seed-0"):
        promote("gamma-25-sed-0")


def test_experiments_of_one_name_are_told_apart_by_their_runs(start):
    ids = [start("twin"), start("twin")]
    start("twin", tags={"blockdrop.role": "stage"})
    with pytest.raises(ModelError, match="2 experiments are named 'twin'") as caught:
        promote("twin")
    assert all(run_id in str(caught.value) for run_id in ids)


def test_run_without_a_model_is_said(start):
    run_id = start("empty")
    with pytest.raises(ModelError, match=rf"run {run_id} \(empty\) has no model; `make sync`"):
        promote("empty")


@pytest.mark.parametrize(("name", "alias"), [("a/b", "champion"), ("refused", "v1")])
def test_names_that_mlflow_reserves_are_said(start, folder, name, alias):
    run_id = start()
    log_model(run_id, folder)
    with pytest.raises(ModelError, match=f"MLflow refuses {name}@{alias}"):
        promote(run_id, registered_name=name, alias=alias)


# the command


@pytest.fixture
def run_command(monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["promote", *words])
        command.main()
        return capsys.readouterr().out

    return run


def test_command_says_the_old_and_the_new_champion(start, folder, registered, run_command):
    for name in ("one", "two"):
        log_model(start(f"{registered}-{name}"), folder)
    first, second, again = (
        run_command(f"{registered}-{name}", "--registered-name", registered)
        for name in ("one", "two", "two")
    )
    assert f"champion of {registered}: version 1 (run {registered}-one, m-" in first
    assert "before: there was none" in first
    assert f"champion of {registered}: version 2 (run {registered}-two, m-" in second
    assert f"before: version 1 (models:/{registered}/1)" in second
    assert "before: the same" in again
    assert f"--model models:/{registered}@champion" in again


def test_command_ends_in_one_line(run_command, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: no run has the id and no experiment the name 'no'"):
        run_command("no")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit, match=r"^error: http://127\.0\.0\.1:9 can't be used"):
        run_command("no")


def test_predict_takes_the_champion(start, folder, registered, images, tmp_path, monkeypatch, capsys):
    run_id = start()
    log_model(run_id, folder)
    uri = promote(run_id, registered_name=registered).uri
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    outputs = []
    for model in (str(folder), uri):
        words = ["predict", str(tmp_path / "a.png"), "--json", "--model", model]
        monkeypatch.setattr(sys, "argv", words)
        predict.main()
        outputs.append(capsys.readouterr())
    assert outputs[0].out
    assert outputs[0] == outputs[1]


# serving


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(uri: str, *, cwd: Path, store_uri: str, cache: Path):
    """`mlflow models serve` in a folder of its own, without the checkout on any path; its address."""
    port = free_port()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*TRACKING_VARIABLES, "DVC_ROOT")
    }
    kept.pop("PYTHONPATH", None)
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": store_uri,
        "XDG_CACHE_HOME": str(cache),
        "BLOCKDROP_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    log = cwd / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local",
                "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            ],
            cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=5):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # its own group: MLflow starts uvicorn below itself
        process.wait(timeout=60)


def ask(address: str, content: object) -> tuple[int, object]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def files_of(folder: Path) -> set[str]:
    """A logged model's files, but for what Python and MLflow add when they load it."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in paths if "__pycache__" not in name} - {"registered_model_meta"}


@pytest.mark.slow
def test_champion_is_served_where_there_is_no_checkout(
    home, client, start, folder, registered, tmp_path, images
):
    run_id = start()
    model_id = log_model(run_id, folder, example=images)
    uri = promote(run_id, registered_name=registered).uri
    files = Path(client.get_logged_model(model_id).artifact_location.removeprefix("file://"))
    before = files_of(files)
    expected = records(folder, images)
    foreign, cache = tmp_path / "elsewhere", tmp_path / "cache"
    foreign.mkdir()
    with served(uri, cwd=foreign, store_uri=client.tracking_uri, cache=cache) as address:
        assert ask(address, {"inputs": images.tolist()}) == (200, {"predictions": expected})
        example = json.loads((files / "serving_input_example.json").read_text())
        assert ask(address, example) == (200, {"predictions": expected[:2]})
        bright = images.tolist()
        bright[0][0][0][0] = 256
        for wrong in (bright, images[:, :4].tolist(), []):
            assert ask(address, {"inputs": wrong})[0] == 400
        assert ask(address, {"inputs": images[:1].tolist()}) == (200, {"predictions": expected[:1]})
    assert files_of(files) == before
    assert [path.name for path in foreign.iterdir()] == ["log.txt"]
    with contextlib.suppress(UnavailableError):  # no compiler: it was slower, and wrote nothing
        assert Path(native.library()._name).suffix == ".so"
        assert [path.suffix for path in (cache / "blockdrop").iterdir()] == [".so"]


def documented_request(port: int) -> str:
    """The commands of docs/tracking.md that ask a served model, for a server on that port."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/tracking.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "/invocations" in block]
    assert "127.0.0.1:5000/" in block
    return block.replace("127.0.0.1:5000", f"127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_documented_request_is_answered_by_a_model_of_the_default_size(
    client, start, folder, registered, tmp_path
):
    size = yaml.safe_load((ROOT / "presets/digits.yaml").read_text())["data"]["image_size"]
    checkpoint.save(networks(image_size=size), folder)
    run_id = start()
    log_model(run_id, folder)
    uri = promote(run_id, registered_name=registered).uri
    there, cache = tmp_path / "there", tmp_path / "cache"
    there.mkdir()
    (there / "pretrained").symlink_to(ROOT / "pretrained")
    with served(uri, cwd=there, store_uri=client.tracking_uri, cache=cache) as address:
        command = documented_request(int(address.rpartition(":")[2]))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", command], cwd=there, env=os.environ | {"PATH": path},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    (row,) = json.loads(done.stdout)["predictions"]
    assert row["class"] in networks().classes
    assert len(row["kept_blocks"]) == 6


def test_named_requirements_are_what_the_served_code_imports():
    used = {"pandas"}  # of mlflow_model.py
    for file in closure("pipeline/serving/predictor.py") | closure("pipeline/device.py"):
        # of what is imported later, in functions, the served model does without
        for node in ast.parse((ROOT / file).read_text()).body if file.endswith(".py") else ():
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add((node.module or "").partition(".")[0])
    third_party = used - {"pipeline", *sys.stdlib_module_names}
    assert third_party == {*registry.PACKAGES, "torchvision"}


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_torchvision_is_required_by_networks_of_its_blocks_alone(family):
    resnet = make_resnet(family=family, depth=14, width=4, num_classes=2)
    networks = Checkpoint(
        stage="pretrain", resnet=resnet, policy_net=None, normalisation=NORMALISATION, image_size=8,
        classes=("a", "b"), metrics={},
    )  # fmt: skip
    named = {line.partition("==")[0] for line in registry._requirements(networks)}
    assert ("torchvision" in named) == (family == "imagenet")
