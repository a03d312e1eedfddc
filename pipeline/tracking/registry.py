"""Trained models in MLflow: logged at the run that trained them, one of them registered as champion.

A logged model holds the checkpoint folder and this package, so that it serves where there is no checkout
(serving/mlflow_model.py). MLflow's global state is not changed: all calls go through a client.
"""

import difflib
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS, Checkpoint
from pipeline.serving.predictor import image_size_of
from pipeline.tracking import model_card
from pipeline.tracking.connection import reason, silence_mlflow
from pipeline.tracking.identity import run_name
from pipeline.tracking.runs import TAG_ROLE, TAG_STAGE, find_run
from pipeline.tracking.store import shown_uri, store, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

NAME = "blockdrop"  # of logged models and, by default, of the registered one
ALIAS = "champion"
TAG_WEIGHTS = "blockdrop.weights_sha256"
TAG_DVC = "dvc.md5"
TAG_MODEL = "blockdrop.model_id"  # of a registered version; the SQL store forgets MLflow's own field
ARTIFACT = "checkpoint"  # folder below `artifacts` of a logged model, the same in mlflow_model.py
TAG_NOTE = "mlflow.note.content"  # the description on MLflow's pages
SCHEME = "models:/"
IMAGE_SIZE = "data.image_size"  # parameter of a run
PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "pandas")  # what the served code imports
EXAMPLES = 2  # images beside a model, to try it
MAX_RUNS = 50_000  # the most that MLflow returns at once


class ModelError(UserError):
    """A run, a model or a version can't be had; the message says which and names the remedy."""


class UnknownRunError(ModelError):
    """No run has that id, and no experiment that name."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """The result of `promote`: the registered model, which run trained it, and its alias."""

    name: str
    alias: str
    version: int
    previous: int | None  # version that the alias named before
    model_id: str
    run_id: str
    run_name: str

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.name}@{self.alias}"


def log_model(
    run_id: str,
    folder: Path,
    *,
    example: NDArray[np.uint8] | None = None,
    dvc_md5: str = "",
) -> str:
    """Log a checkpoint folder as a model of a run, once for each run and weights; returns its id.

    It gets the run's parameters and its metrics at step 0. Takes the store's lock: don't call it while
    `store()` is held.

    Args:
        folder: a checkpoint with a ResNet.
        example: images [M, S, S, 3] uint8, the first two of which become the model's example; None:
            noise. An older checkpoint holds no image size; then it is that of these images, or else the
            run's parameter data.image_size.
        dvc_md5: DVC's digest of the folder.

    Raises:
        CheckpointError: the folder can't be used.
        PredictionError: its image size is not known, or the example has another.
    """
    networks = checkpoint.load(folder)
    networks.need_resnet()
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    tags = {TAG_WEIGHTS: digest, TAG_STAGE: networks.stage} | ({TAG_DVC: dvc_md5} if dvc_md5 else {})
    with store() as (client, _):
        run = client.get_run(run_id)
        model = _logged(client, run, digest)
        size = _image_size(networks, example, run)
        networks = replace(networks, image_size=size)
        card = model_card.model_card(networks, run, dvc_md5)
        if model is None:
            images = _noise(size) if example is None else example[:EXAMPLES]
            model = client.create_logged_model(
                run.info.experiment_id, NAME, run_id, tags, run.data.params
            )
            _upload(client, model, run_id, networks, images, card)
        if model.tags.get(TAG_NOTE) != card:  # numbers may be newer than those in the file
            client.set_logged_model_tags(model.model_id, {TAG_NOTE: card})
        _link_metrics(client, model, run)
    return str(model.model_id)


def promote(run: str, *, registered_name: str = NAME, alias: str = ALIAS) -> Promotion:
    """Give an alias to the model of a run, by its id or its experiment's name, and register it first.

    Raises:
        ModelError: there is no such run, several experiments have that name, the run has no model, or
            MLflow refuses one of the names.
    """
    with store() as (client, experiment_id):
        source = _find_run(client, experiment_id, run)
        model = _newest(client, source)
        version, previous = _set_alias(client, model, registered_name, alias)
    return Promotion(
        name=registered_name,
        alias=alias,
        version=version,
        previous=previous,
        model_id=str(model.model_id),
        run_id=str(source.info.run_id),
        run_name=str(source.info.run_name),
    )


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Download the checkpoint folder of a logged model; it is deleted at the end of the context.

    Raises:
        ModelError: there is no such model, or another program logged it.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        with store() as (client, _):
            location = _location(client, uri)
    except MlflowException as error:
        raise ModelError(
            f"{uri} is not in {shown_uri()} ({reason(error)}); write models:/NAME@ALIAS, "
            "models:/NAME/VERSION or models:/m-ID (`python -m tools.promote` registers models), or set "
            "MLFLOW_TRACKING_URI to the store that has it"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            with silence_mlflow():
                path = download_artifacts(
                    artifact_uri=f"{location.rstrip('/')}/artifacts/{ARTIFACT}",
                    dst_path=folder,
                    tracking_uri=store_uri(),
                )
        except (MlflowException, OSError) as error:
            raise ModelError(
                f"{uri} holds no artifacts/{ARTIFACT} that can be read ({reason(error)}); take a "
                "model that this pipeline has logged, or log it again with `make sync`"
            ) from None
        yield Path(path)


def _models_of(client: "MlflowClient", run: "Run", condition: str = "") -> "list[LoggedModel]":
    condition = f"source_run_id = '{run.info.run_id}' AND name = '{NAME}'{condition}"
    return list(client.search_logged_models([run.info.experiment_id], filter_string=condition))


def _logged(client: "MlflowClient", run: "Run", digest: str) -> "LoggedModel | None":
    """The run's model of these weights; models that a killed process left incomplete are deleted."""
    ready = None
    for model in _models_of(client, run, f" AND tags.`{TAG_WEIGHTS}` = '{digest}'"):
        if model.status == "READY":
            ready = model
        else:
            client.delete_logged_model(model.model_id)
    return ready


def _newest(client: "MlflowClient", run: "Run") -> "LoggedModel":
    ready = [model for model in _models_of(client, run) if model.status == "READY"]
    if not ready:
        raise ModelError(
            f"run {run.info.run_id} ({run.info.run_name}) has no model; `make sync` logs those of "
            "finished experiments, or name another run"
        )
    return max(ready, key=lambda model: model.creation_timestamp)


def _upload(
    client: "MlflowClient",
    model: "LoggedModel",
    run_id: str,
    networks: Checkpoint,
    example: NDArray[np.uint8],
    card: str,
) -> None:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    from pipeline.serving import mlflow_model

    with tempfile.TemporaryDirectory() as temporary, silence_mlflow():
        folder, model_folder = Path(temporary) / ARTIFACT, Path(temporary) / "model"
        checkpoint.save(networks, folder)
        save_model(
            model_folder,
            python_model=mlflow_model.__file__,
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(Path(pipeline.__file__).parent)],
            signature=_signature(networks),
            input_example=example,
            pip_requirements=_requirements(networks),  # MLflow would run the model to find them
            metadata={
                "classes": list(networks.classes),
                "stage": networks.stage,
                "images": f"[B, {example.shape[1]}, {example.shape[1]}, 3], whole numbers 0 to 255",
            },
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
        )
        (model_folder / model_card.FILE).write_text(card, encoding="utf-8")
        client.log_model_artifacts(model.model_id, str(model_folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _signature(networks: Checkpoint) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    # MLflow casts JSON to the type that is named here, 0.5 to 0 and true to 1; objects stay as they are
    images = TensorSpec(np.dtype(object), (-1,))
    columns: dict[str, DataType | Array] = {
        "class": DataType.string,
        "confidence": DataType.double,
        "probabilities": Array(DataType.double),
        "kept_blocks": Array(DataType.boolean),
        "blocks": DataType.long,
        "flops": DataType.double,
        "flops_saved": DataType.double,
    }
    outputs = Schema([ColSpec(kind, name) for name, kind in columns.items()])
    signature = ModelSignature(inputs=Schema([images]), outputs=outputs)
    if networks.policy_net is not None and networks.policy_net.path_values is not None:
        dial = [ParamSpec(name, DataType.double, None) for name in ("gamma", "budget")]
        signature.params = ParamSchema(dial)
    return signature


def _requirements(networks: Checkpoint) -> list[str]:
    """The installed versions, without a local part such as +cpu, which no package index has."""
    resnet, policy_net = networks.resnet, networks.policy_net
    families = {resnet and resnet.family, policy_net and policy_net.features.family}
    names = [*PACKAGES, *(["torchvision"] if "imagenet" in families else [])]
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def _image_size(networks: Checkpoint, example: NDArray[np.uint8] | None, run: "Run") -> int:
    size = None if example is None else example.shape[1]
    if size is None and networks.image_size is None and IMAGE_SIZE in run.data.params:
        size = int(run.data.params[IMAGE_SIZE])
    return image_size_of(networks, size)


def _noise(size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(256, size=(EXAMPLES, size, size, 3), dtype=np.uint8)


def _link_metrics(client: "MlflowClient", model: "LoggedModel", run: "Run") -> None:
    """Log those that the model lacks, at the time of the run's own point: the run gets none twice."""
    from mlflow.entities import Metric

    linked = {(metric.key, metric.value) for metric in model.metrics or ()}
    points = {
        name: Metric(name, value, point.timestamp, 0, model.model_id)
        for name, value in run.data.metrics.items()
        if (name, value) not in linked
        for point in client.get_metric_history(run.info.run_id, name)
        if (point.step, point.value) == (0, value)  # else of a learning curve
    }
    client.log_batch(run.info.run_id, metrics=list(points.values()))


def _find_run(client: "MlflowClient", experiment_id: str, id_or_name: str) -> "Run":
    run = find_run(client, id_or_name)
    if run is not None:
        return run
    parents = client.search_runs(
        [experiment_id], filter_string=f"tags.`{TAG_ROLE}` = 'parent'", max_results=MAX_RUNS
    )
    matches = [run for run in parents if run.info.run_name == run_name(id_or_name)]
    if len(matches) > 1:
        raise ModelError(
            f"{len(matches)} experiments are named {id_or_name!r}; name one of their runs: "
            f"{', '.join(run.info.run_id for run in matches)}"
        )
    if not matches:
        known = sorted({str(run.info.run_name) for run in parents})
        near = difflib.get_close_matches(id_or_name, known) or known[:5]
        raise UnknownRunError(
            f"no run has the id and no experiment the name {id_or_name!r}; "
            + (f"there are {', '.join(near)}" if near else "`make repro` or `make sync` makes some")
        )
    return matches[0]


def _set_alias(
    client: "MlflowClient", model: "LoggedModel", name: str, alias: str
) -> tuple[int, int | None]:
    """Give the model's version the alias; returns the version, and the one that had the alias before."""
    from mlflow.exceptions import MlflowException

    try:
        with silence_mlflow():
            version = _register(client, model, name)
        previous = client.get_registered_model(name).aliases.get(alias)
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise ModelError(f"MLflow refuses {name}@{alias} ({reason(error)}); take other names") from None
    return int(version), None if previous is None else int(previous)


def _register(client: "MlflowClient", model: "LoggedModel", name: str) -> str:
    """The model's version, made when there is none."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(name, description=model_card.ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    card = model.tags.get(TAG_NOTE)  # older models have none
    for version in client.search_model_versions(_named(name)):
        if _is_of(version, model):
            if card and not version.description:  # else people wrote one
                client.update_model_version(name, version.version, card)
            return str(version.version)
    new = client.create_model_version(
        name,
        model.artifact_location,  # not models:/ID: a local store would look for that in the global one
        model.source_run_id,
        tags={TAG_MODEL: model.model_id},
        description=card,
        model_id=model.model_id,
    )
    links = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))  # what the UI's pages show
    links.append({"name": name, "version": new.version})
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(links)})
    return str(new.version)


def _named(name: str) -> str:
    """A filter for versions of a registered model; in MLflow's filters no quote can be escaped."""
    if "'" in name and '"' in name:
        raise ModelError(f"{name}: MLflow finds no name with both kinds of quotes; take another one")
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def _is_of(version: "ModelVersion", model: "LoggedModel") -> bool:
    """Whether the version is this model, also where it was registered in the UI."""
    sources = (model.artifact_location, f"{SCHEME}{model.model_id}")
    return version.tags.get(TAG_MODEL) == model.model_id or version.source in sources


def _location(client: "MlflowClient", uri: str) -> str:
    path = uri.removeprefix(SCHEME)
    if "@" not in path and "/" not in path:
        return str(client.get_logged_model(path).artifact_location)
    if "@" in path:
        name, _, alias = path.rpartition("@")
        version = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, version = path.partition("/")
    return str(client.get_model_version_download_uri(name, version))
