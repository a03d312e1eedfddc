"""Trained models in MLflow: logged at the run that made them, and one of them the champion.

Nothing here changes MLflow's global state: all goes through a client of the store. A logged model holds
the checkpoint folder and this package, so that it serves where there is no checkout (served.py).
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS, Checkpoint
from pipeline.serving import mlflow_model
from pipeline.serving.predictor import image_size_of
from pipeline.tracking.connection import reason
from pipeline.tracking.runs import TAG_ROLE
from pipeline.tracking.store import shown_uri, store, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

NAME = "blockdrop"  # of logged models and, unless told otherwise, of the registered one
ALIAS = "champion"
ARTIFACT = "checkpoint"  # folder below `artifacts` of a logged model; served.py has the same name
TAG_WEIGHTS = "blockdrop.weights_sha256"
TAG_STAGE = "blockdrop.stage"
TAG_DVC = "dvc.md5"
TAG_MODEL = "blockdrop.model_id"  # of a registered version; the SQL store forgets MLflow's own field
SCHEME = "models:/"
IMAGE_SIZE = "data.image_size"  # parameter of a run
PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "pandas")  # what the served code imports
EXAMPLES = 2  # images beside a model, to try it


class ModelError(UserError):
    """A run, a model or a version is not to be had; the message says which and names the remedy."""


class UnknownRunError(ModelError):
    """No run has that id, and no experiment that name."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What `promote` did.

    Attributes:
        name: of the registered model.
        alias: that now names `version`.
        version: of the registered model.
        previous: the version that the alias named before, None if none.
        model_id: of the logged model.
        run_id: of the run that made it.
        run_name: the name of that run.
    """

    name: str
    alias: str
    version: int
    previous: int | None
    model_id: str
    run_id: str
    run_name: str

    @property
    def uri(self) -> str:
        """What loads and serves the model."""
        return f"{SCHEME}{self.name}@{self.alias}"


def log_model(
    run_id: str,
    folder: Path,
    *,
    example: NDArray[np.uint8] | None = None,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | None] | None = None,
    dvc_md5: str = "",
) -> str:
    """Log a checkpoint folder as a model of a run, once for each run and weights; the model's id.

    Takes the store's lock: not to be called while `store()` is held.

    Args:
        run_id: an existing run, finished or not.
        folder: a checkpoint with a ResNet.
        example: images [M, S, S, 3] uint8 from which the first two become the model's example; None:
            noise. Where an older checkpoint does not say its image size it is theirs, or else the run's
            parameter data.image_size.
        params: of the model; None: all of the run's.
        metrics: linked to the model, undefined ones (None) left out; None: all of the run's at step 0.
        dvc_md5: DVC's digest of the folder.

    Raises:
        CheckpointError: the folder can't be used.
        PredictionError: its image size is not known, or the example has another.
    """
    own = checkpoint.load(folder)
    own.need_resnet()
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    tags = {TAG_WEIGHTS: digest, TAG_STAGE: own.stage} | ({TAG_DVC: dvc_md5} if dvc_md5 else {})
    with store() as (client, _):
        run = client.get_run(run_id)
        model = _logged(client, run, digest)
        if model is None:
            size = _size(own, example, run)
            images = _noise(size) if example is None else example[:EXAMPLES]
            texts = {k: str(v) for k, v in (run.data.params if params is None else params).items()}
            model = client.create_logged_model(run.info.experiment_id, NAME, run_id, tags, texts)
            _upload(client, model, run_id, replace(own, image_size=size), images)
        _link_metrics(client, model, run, metrics)
    return str(model.model_id)


def promote(run: str, *, registered_name: str = NAME, alias: str = ALIAS) -> Promotion:
    """Register the model of a run, unless it is registered already, and give it an alias.

    Args:
        run: id of a run, or the name of an experiment, whose parent run is meant then.
        registered_name: of the model in the registry; made when it isn't there.
        alias: taken from the version that had it.

    Raises:
        ModelError: there is no such run, several experiments have that name, the run has no model, or
            MLflow refuses one of the names.
    """
    with store() as (client, experiment_id):
        made = client.get_run(_find_run(client, experiment_id, run))
        model = _newest(client, made)
        version, previous = _point_at(client, model, registered_name, alias)
    return Promotion(
        name=registered_name,
        alias=alias,
        version=version,
        previous=previous,
        model_id=str(model.model_id),
        run_id=str(made.info.run_id),
        run_name=str(made.info.run_name),
    )


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """The checkpoint folder of a logged model, here as long as the context lasts.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`.

    Raises:
        ModelError: there is no such model, or it is none of this pipeline's.
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
            with _quietly():
                path = download_artifacts(
                    artifact_uri=f"{location.rstrip('/')}/artifacts/{ARTIFACT}",
                    dst_path=folder,
                    tracking_uri=store_uri(),
                )
        except (MlflowException, OSError) as error:
            raise ModelError(
                f"{uri} holds no artifacts/{ARTIFACT} that can be read ({reason(error)}); take a "
                "model that this pipeline has logged, or log it anew with `make sync`"
            ) from None
        yield Path(path)


def _models_of(client: "MlflowClient", run: "Run", condition: str = "") -> "list[LoggedModel]":
    wanted = f"source_run_id = '{run.info.run_id}' AND name = '{NAME}'{condition}"
    return list(client.search_logged_models([run.info.experiment_id], filter_string=wanted))


def _logged(client: "MlflowClient", run: "Run", digest: str) -> "LoggedModel | None":
    """The run's model of these weights; what a killed process left of one is removed."""
    found = None
    for model in _models_of(client, run, f" AND tags.`{TAG_WEIGHTS}` = '{digest}'"):
        if model.status == "READY":
            found = model
        else:
            client.delete_logged_model(model.model_id)
    return found


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
    own: Checkpoint,
    example: NDArray[np.uint8],
) -> None:
    """Write the model's files and mark it as ready, once all of them are in the store."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    with tempfile.TemporaryDirectory() as place, _quietly():
        folder, made = Path(place) / ARTIFACT, Path(place) / "model"
        checkpoint.save(own, folder)
        save_model(
            made,
            python_model=mlflow_model.__file__,
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(Path(pipeline.__file__).parent)],
            signature=_signature(),
            input_example=example,
            pip_requirements=_requirements(own),  # named: MLflow would run the model to find them
            metadata={
                "classes": list(own.classes),
                "stage": own.stage,
                "images": f"[B, {example.shape[1]}, {example.shape[1]}, 3], whole numbers 0 to 255",
            },
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                run_id=run_id,
                model_uuid=model.model_id,
                model_id=model.model_id,
            ),
        )
        client.log_model_artifacts(model.model_id, str(made))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


@contextmanager
def _quietly() -> Iterator[None]:
    """Without MLflow's progress bars and remarks: a model is a few small files."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR as BAR

    logger, before = logging.getLogger("mlflow"), BAR.get_raw()
    level = logger.level
    logger.setLevel(logging.WARNING)
    BAR.set(False)
    try:
        yield
    finally:
        logger.setLevel(level)
        BAR.unset() if before is None else BAR.set(before)


def _signature() -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    # MLflow casts JSON to the type that is named here, 0.5 to 0 and true to 1; as objects all stays
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
    return ModelSignature(inputs=Schema([images]), outputs=outputs)


def _requirements(own: Checkpoint) -> list[str]:
    """The versions here; without a local part such as +cpu, which no package index has."""
    families = {own.resnet and own.resnet.family, own.policy_net and own.policy_net.features.family}
    names = [*PACKAGES, *(["torchvision"] if "imagenet" in families else [])]
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def _size(own: Checkpoint, example: NDArray[np.uint8] | None, run: "Run") -> int:
    told = None if example is None else example.shape[1]
    if told is None and own.image_size is None and IMAGE_SIZE in run.data.params:
        told = int(run.data.params[IMAGE_SIZE])
    return image_size_of(own, told)


def _noise(size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(256, size=(EXAMPLES, size, size, 3), dtype=np.uint8)


def _link_metrics(
    client: "MlflowClient",
    model: "LoggedModel",
    run: "Run",
    metrics: Mapping[str, float | None] | None,
) -> None:
    """Those that the model lacks; as points of the run where it has them, so that it gets none twice."""
    from mlflow.entities import Metric

    known = {(metric.key, metric.value) for metric in model.metrics or ()}
    wanted = run.data.metrics if metrics is None else metrics
    points = []
    for name, value in wanted.items():
        if value is None or (name, value) in known:
            continue
        own = _point(client, run, name, value)
        if own is not None or metrics is not None:  # else a learning curve
            time_of_it = int(time.time() * 1000) if own is None else own.timestamp
            points.append(Metric(name, value, time_of_it, 0, model.model_id))
    client.log_batch(run.info.run_id, metrics=points)


def _point(client: "MlflowClient", run: "Run", name: str, value: float) -> "Metric | None":
    if run.data.metrics.get(name) != value:
        return None
    history = client.get_metric_history(run.info.run_id, name)
    return next((point for point in history if point.step == 0 and point.value == value), None)


def _find_run(client: "MlflowClient", experiment_id: str, wanted: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(wanted).info.run_id)
    except MlflowException as error:  # a name is no id; anything else is another's to mend
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    names = _parents(client, experiment_id)
    found = [run_id for run_id, name in names.items() if name == wanted]
    if len(found) > 1:
        raise ModelError(
            f"{len(found)} experiments are named {wanted!r}; name one of their runs: {', '.join(found)}"
        )
    if not found:
        known = sorted(set(names.values()))
        near = difflib.get_close_matches(wanted, known) or known[:5]
        raise UnknownRunError(
            f"no run has the id and no experiment the name {wanted!r}; "
            + (f"there are {', '.join(near)}" if near else "`make repro` or `make sync` makes some")
        )
    return found[0]


def _parents(client: "MlflowClient", experiment_id: str) -> dict[str, str]:
    """Names of the parent runs of experiments, by id."""
    names: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string=f"tags.`{TAG_ROLE}` = 'parent'", page_token=token
        )
        names |= {str(run.info.run_id): str(run.info.run_name) for run in page}
        token = page.token
        if not token:
            return names


def _point_at(
    client: "MlflowClient", model: "LoggedModel", name: str, alias: str
) -> tuple[int, int | None]:
    """Give the model's version the alias; the version, and the one that had the alias before."""
    from mlflow.exceptions import MlflowException

    try:
        with _quietly():
            version = _register(client, model, name)
        previous = client.get_registered_model(name).aliases.get(alias)
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise ModelError(f"MLflow refuses {name}@{alias} ({reason(error)}); take other names") from None
    return int(version), None if previous is None else int(previous)


def _register(client: "MlflowClient", model: "LoggedModel", name: str) -> str:
    """The model's version, which is made when there is none."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(_named(name)):
        if _is_of(version, model):
            return str(version.version)
    made = client.create_model_version(
        name,
        model.artifact_location,  # not models:/ID: a local store would look for that in the global one
        model.source_run_id,
        tags={TAG_MODEL: model.model_id},
        model_id=model.model_id,
    )
    links = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))  # what the UI's pages show
    links.append({"name": name, "version": made.version})
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(links)})
    return str(made.version)


def _named(name: str) -> str:
    """A filter for versions of a registered model; MLflow's filters know no escaped quotes."""
    if "'" in name and '"' in name:
        raise ModelError(f"{name}: MLflow finds no name with both kinds of quotes; take another one")
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def _is_of(version: "ModelVersion", model: "LoggedModel") -> bool:
    """Whether the version is this model, whoever registered it (the UI, say)."""
    sources = (model.artifact_location, f"{SCHEME}{model.model_id}")
    return version.tags.get(TAG_MODEL) == model.model_id or version.source in sources


def _location(client: "MlflowClient", uri: str) -> str:
    """Where the files of a model are."""
    rest = uri.removeprefix(SCHEME)
    if "@" not in rest and "/" not in rest:
        return str(client.get_logged_model(rest).artifact_location)
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        version = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, version = rest.partition("/")
    return str(client.get_model_version_download_uri(name, version))
