"""Runs that older versions of this code logged, brought to today's names, so that they compare."""

import contextlib
from typing import TYPE_CHECKING

from pipeline.tracking.identity import local_preset
from pipeline.tracking.runs import HIDDEN, TAG_PRESET, TAG_ROLE, as_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# tags for the code alone, which stood among those for people; every run has one of the first two
FORMER_TAGS = (
    "blockdrop.key", "blockdrop.process", "blockdrop.fingerprint", "blockdrop.logged.curves",
    "blockdrop.logged.artifacts", "blockdrop.logged.model",
)  # fmt: skip
MAX_RUNS = 50_000  # the most that MLflow returns at once


def bring_up_to_date(client: "MlflowClient", experiment_id: str) -> None:
    """Rename tags, and log metrics in today's units; nothing is deleted but old tags."""
    for tag in FORMER_TAGS[:2]:
        for run in client.search_runs([experiment_id], f"tags.`{tag}` LIKE '%'", max_results=MAX_RUNS):
            _bring_up_to_date(client, run)


def _bring_up_to_date(client: "MlflowClient", run: "Run") -> None:
    from mlflow.exceptions import MlflowException

    run_id, tags, metrics = run.info.run_id, run.data.tags, run.data.metrics
    missing = [metric for metric in as_metrics(metrics) if metric.key not in metrics]
    client.log_batch(run_id, metrics=missing)
    if tags.get(TAG_ROLE) == "parent" and (preset := local_preset(run.data.params)):
        client.set_tag(run_id, TAG_PRESET, preset)
    for tag in FORMER_TAGS:  # last, as they say that something is to be done
        if tag in tags:
            client.set_tag(run_id, HIDDEN + tag, tags[tag])
    for tag in FORMER_TAGS:
        if tag in tags:
            with contextlib.suppress(MlflowException):  # another sync was faster
                client.delete_tag(run_id, tag)
