"""The parent run of an experiment, completed from its record: the run that people compare.

Idempotent: nothing is logged twice. Trainings' own runs whose live logging stopped are completed too.
"""

import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.html import as_code, as_markdown
from pipeline.tracking import registry
from pipeline.tracking.dvc_results import MODEL, PREPARED, Curve, Record
from pipeline.tracking.identity import origin_tags, run_name
from pipeline.tracking.runs import (
    HIDDEN,
    TAG_KEY,
    TAG_PARENT,
    TAG_PRESET,
    TAG_ROLE,
    TAG_STAGE,
    as_metrics,
    find_parent,
    first_run,
    make_parent,
)
from pipeline.tracking.store import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

TAG_FINGERPRINT = f"{HIDDEN}blockdrop.fingerprint"
TAG_LOGGED = (
    f"{HIDDEN}blockdrop.logged"  # digest of the logged content, by kind, so that it is logged once
)
TAG_REVISION = "dvc.revision"  # the DVC experiment's commit, once all of it is logged
TAG_NAME = "dvc.experiment"  # the name that DVC gives it
TAG_SUPERSEDED = "blockdrop.superseded"
TAG_NOTE = "mlflow.note.content"


def complete(record: Record, *, finish: bool) -> str:
    """Create the parent run of an experiment, or log what it lacks."""
    with store() as (client, experiment_id):
        run_id = make_parent(
            client,
            experiment_id,
            name=record.name,
            baseline=record.baseline,
            params=record.params,
            tags=_origin(record),
        )
        _retire_namesakes(client, experiment_id, record)
    run = client.get_run(run_id)
    _set_tag(client, run, TAG_FINGERPRINT, record.fingerprint)  # first, should the rest fail
    _log_metrics(client, run, record)
    _log_dataset(client, run, record)
    _log_artifacts(client, run, record)
    _log_model(client, run, record)
    _set_tags(client, run, record)
    if finish:
        for training in _newest_trainings(client, run, record):
            _complete_training(client, training, record)
        if run.info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED")
    return run_id


def find(client: "MlflowClient", experiment_id: str, record: Record) -> "Run | None":
    """The parent run that has the record's result already, possibly under another name."""
    condition = f"tags.`{TAG_FINGERPRINT}` = '{record.fingerprint}' and tags.`{TAG_ROLE}` = 'parent'"
    named = find_parent(client, experiment_id, record.key)
    return named or first_run(client, experiment_id, condition)


def find_complete(client: "MlflowClient", experiment_id: str, revision: str) -> "Run | None":
    """The finished parent run that has everything of an experiment's commit."""
    condition = f"tags.`{TAG_REVISION}` = '{revision}' and attributes.status = 'FINISHED'"
    return first_run(client, experiment_id, condition)


def rename(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Give a run the name that its experiment has now; `complete` does the rest."""
    client.set_tag(run.info.run_id, TAG_KEY, record.key)
    client.update_run(run.info.run_id, name=run_name(record.name))


def describe(record: Record) -> str:
    """The run's description: its headline metrics as a Markdown table."""
    metrics = record.metrics
    rows = [
        ("every block", "full_accuracy", "num_blocks", "full_flops"),
        ("**BlockDrop**", "accuracy", "blocks_mean", "flops_mean"),
    ]
    for prefix in sorted({k.rsplit(".", 1)[0] for k in metrics if k.startswith(("sole.", "static."))}):
        kind, name = prefix.split(".", 1)
        tuned = "not finetuned" if record.params.get("finetune.epochs") == "0" else "finetuned"
        name = as_markdown(name.replace("_", " "))
        label = f"ResNet-{name}" if kind == "sole" else f"{name} blocks, {tuned}"
        rows.append((label, f"{prefix}.accuracy", f"{prefix}.blocks", f"{prefix}.flops"))
    lines = ["| network | accuracy | blocks | MFLOPs |", "|---|---|---|---|"]
    for label, *names in rows:
        forms = zip(names, ("{:.2f} %", "{:.2f}", "{:.4g}"), (100, 1, 1e-6), strict=True)
        cells = [form.format(metrics[n] * factor) if n in metrics else "" for n, form, factor in forms]
        lines.append(f"| {' | '.join([label, *cells])} |")
    if "flops_saved" in metrics:
        saved = 100 * metrics["flops_saved"]
        lines += ["", f"{saved:.1f} % of the FLOPs saved, policy network counted."]
    if record.revision:
        apply = as_code(f"dvc exp apply {shlex.quote(record.name)}")
        lines += ["", f"{apply} brings it back."]
    return "\n".join(lines)


def _origin(record: Record) -> dict[str, str]:
    if not record.revision:
        return origin_tags()
    return {"git.commit": record.baseline, "mlflow.source.git.commit": record.baseline}


def _retire_namesakes(client: "MlflowClient", experiment_id: str, record: Record) -> None:
    """Mark the runs of experiments that `dvc exp run -f` has replaced by this one, of the same name."""
    if not record.revision:
        return
    # the name is compared here: in MLflow's filters no quote can be escaped
    condition = (
        f"tags.`dvc.baseline` = '{record.baseline}' and tags.`{TAG_ROLE}` = 'parent' "
        f"and tags.`{TAG_KEY}` != '{record.key}'"
    )
    for run in client.search_runs([experiment_id], filter_string=condition):
        tags = run.data.tags
        if tags.get(TAG_NAME) == record.name and TAG_SUPERSEDED not in tags:
            client.set_tag(run.info.run_id, TAG_SUPERSEDED, record.key)
            client.update_run(run.info.run_id, name=run_name(record.name, " (superseded)"))


def _log_metrics(client: "MlflowClient", run: "Run", record: Record) -> None:
    metrics = [
        metric
        for metric in as_metrics(record.metrics)
        if run.data.metrics.get(metric.key) != metric.value
    ]
    with _once(client, run, "curves", json.dumps(record.curves)) as is_new:
        if is_new:
            metrics += _missing_points(client, run, record.curves)
        client.log_batch(run.info.run_id, metrics=metrics)


def _missing_points(client: "MlflowClient", run: "Run", curves: Mapping[str, Curve]) -> "list[Metric]":
    """The points that the run lacks; an earlier, interrupted sync may have logged some."""
    metrics = []
    for name, points in curves.items():
        logged = _points(client, run, name) if name in run.data.metrics else set()
        for step, value in points:
            metrics += [] if (step, value) in logged else as_metrics({name: value}, step)
    return metrics


def _points(client: "MlflowClient", run: "Run", name: str) -> set[tuple[int, float]]:
    return {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)}


def _newest_trainings(client: "MlflowClient", run: "Run", record: Record) -> "list[Run]":
    """The newest run of each training under the experiment, without those that are running."""
    condition = f"tags.`{TAG_PARENT}` = '{run.info.run_id}'"
    order = ["attributes.start_time ASC"]
    children = client.search_runs([run.info.experiment_id], condition, order_by=order)
    newest = {child.data.tags.get(TAG_STAGE): child for child in children}
    trainings = sorted({name.split("/")[0] for name in record.curves} & set(newest))
    return [newest[name] for name in trainings if newest[name].info.status != "RUNNING"]


def _complete_training(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log the rest of a training's curve and end its run as FINISHED, where its live logging stopped.

    Points are logged in their order, so a run that has the last epoch has all. A run with other points
    than the record's is of another attempt, and stays as it is.
    """
    prefix = run.data.tags[TAG_STAGE] + "/"
    curves = {k.removeprefix(prefix): v for k, v in record.curves.items() if k.startswith(prefix)}
    epochs = [epoch for epoch, _ in next(iter(curves.values()))]
    if run.info.status == "FINISHED" and run.data.metrics.get("epoch") == epochs[-1]:
        return
    curves["epoch"] = [(epoch, float(epoch)) for epoch in epochs]
    for name in curves.keys() & run.data.metrics.keys():
        if not _points(client, run, name) <= set(curves[name]):
            return
    client.log_batch(run.info.run_id, metrics=_missing_points(client, run, curves))
    client.set_terminated(run.info.run_id, "FINISHED", run.info.end_time)


def _log_dataset(client: "MlflowClient", run: "Run", record: Record) -> None:
    """The prepared data set as an input of the run, by DVC's digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    logged = {item.dataset.digest for item in run.inputs.dataset_inputs} if run.inputs else set()
    digest = record.outs.get(PREPARED)
    if digest is None or digest in logged:
        return
    name = record.params.get("data.source", "data")
    source = json.dumps({"path": PREPARED, "md5": digest})
    dataset = Dataset(name=name, digest=digest, source_type="dvc", source=source)
    tags = [InputTag("mlflow.data.context", "train, validation, test")]
    datasets = [DatasetInput(dataset=dataset, tags=tags)]
    try:
        client.log_inputs(run.info.run_id, datasets=datasets)
    except MlflowException:  # a database refuses the second of two clones that add a data set at once
        client.log_inputs(run.info.run_id, datasets=datasets)  # now it is there, and is linked


def _log_artifacts(client: "MlflowClient", run: "Run", record: Record) -> None:
    files = record.artifacts()
    content = repr([(path, hashlib.sha256(data).hexdigest()) for path, data in files.items()])
    with _once(client, run, "artifacts", content) as is_new, tempfile.TemporaryDirectory() as folder:
        if not is_new:
            return
        for path, data in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        client.log_artifacts(run.info.run_id, folder)


def _log_model(client: "MlflowClient", run: "Run", record: Record) -> None:
    if MODEL not in record.outs or not record.is_whole():
        return
    digest = record.outs[MODEL]
    with _once(client, run, "model", digest) as is_new, tempfile.TemporaryDirectory() as folder:
        if not is_new:
            return
        for name in ("model.json", "model.safetensors"):
            (Path(folder) / name).write_bytes(record.files.cat_file(f"{MODEL}/{name}"))
        example = record.examples(registry.EXAMPLES)
        registry.log_model(run.info.run_id, Path(folder), example=example, dvc_md5=digest)


def _set_tags(client: "MlflowClient", run: "Run", record: Record) -> None:
    tags = {TAG_NOTE: describe(record)}
    if record.preset:
        tags[TAG_PRESET] = record.preset
    if MODEL in record.outs:
        tags[f"dvc.md5.{MODEL}"] = record.outs[MODEL]
    if record.revision:
        tags[TAG_NAME] = record.name
    if record.revision and record.is_whole():  # else the next sync has something to add
        tags[TAG_REVISION] = record.revision
    for tag, text in tags.items():
        _set_tag(client, run, tag, text)


def _set_tag(client: "MlflowClient", run: "Run", tag: str, text: str) -> None:
    if run.data.tags.get(tag) != text:
        client.set_tag(run.info.run_id, tag, text)


@contextmanager
def _once(client: "MlflowClient", run: "Run", kind: str, content: str) -> Iterator[bool]:
    """Whether this content was not logged yet; it counts as logged when the body raised nothing."""
    tag, digest = f"{TAG_LOGGED}.{kind}", hashlib.sha256(content.encode()).hexdigest()[:16]
    is_new = run.data.tags.get(tag) != digest
    yield is_new
    if is_new:
        client.set_tag(run.info.run_id, tag, digest)
