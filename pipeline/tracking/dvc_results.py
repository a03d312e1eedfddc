"""The result of an experiment, read from its files: parameters, metrics, learning curves, digests.

The files may be the work tree's or those of any commit (DVC's file system). Stages that DVC takes from
its cache run no code, so only from the files all of an experiment can be logged.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from pipeline import config
from pipeline.infra.errors import UserError
from pipeline.tracking.identity import as_texts, experiment_key, experiment_name, preset_of

PARAMS, LOCK = "params.yaml", "dvc.lock"
PREPARED, MODEL, REPORT = "data/prepared", "models/finetune", "report"
METRICS, TIMES = "metrics", "metrics/times"
TRAININGS = ("pretrain", "prune", "policy_pretrain", "curriculum", "finetune")
ARTIFACTS = (PARAMS, LOCK, REPORT, "plots")
# outs that differ from run to run because they hold times, while the result is the same
WITH_TIMES = (
    "metrics/times", "metrics/benchmark.json", "plots/benchmark", "plots/trade_off.csv", REPORT
)  # fmt: skip
Curve = list[tuple[int, float]]


class RecordError(UserError):
    """The files are not those of a finished experiment; the message says why."""


class UnfinishedError(RecordError):
    """The files are intact, but the pipeline has not finished with these parameters."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One experiment."""

    name: str  # DVC's, or branch and commit
    baseline: str  # the commit it was started from
    revision: str  # the commit that holds it; empty for the work tree
    params: Mapping[str, str]  # every parameter as text, flat
    metrics: Mapping[str, float]  # those of all stages, flat
    # of every training, (epoch, value) under name/metric, the name being pretrain, sole-20, ...
    curves: Mapping[str, Curve]
    outs: Mapping[str, str]  # DVC's digest (md5) of what each stage wrote, by path
    # where to read more, with paths relative to the project
    files: AbstractFileSystem = field(repr=False)

    @property
    def key(self) -> str:
        return experiment_key(self.name, self.baseline, self.params)

    @property
    def preset(self) -> str:
        """The preset that the parameters are of, but for swept ones; empty where they are of none."""
        found = preset_of(self.params, self.files)
        return found[0] if found else ""

    @property
    def fingerprint(self) -> str:
        """Equal for equal results of equal parameters, whatever the name and the times."""
        outs = [
            (path, md5)
            for path, md5 in sorted(self.outs.items())
            if not any(PurePosixPath(path).is_relative_to(other) for other in WITH_TIMES)
        ]
        return hashlib.sha256(repr((sorted(self.params.items()), outs)).encode()).hexdigest()[:16]

    def artifacts(self) -> dict[str, bytes]:
        """The files to look at, by path, without those that DVC's cache lacks."""
        contents = {}
        for top in ARTIFACTS:
            for path in sorted(self.files.find(top)) if self.files.exists(top) else ():
                content = _read(self.files, path)
                if content is not None:
                    contents[str(path)] = content
        return contents

    def examples(self, count: int) -> NDArray[np.uint8] | None:
        """The first test images [count, H, W, 3], read without the rest; None where they are missing."""
        try:
            with self.files.open(f"{PREPARED}/test_images.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                image_bytes = math.prod(shape[1:])  # uint8
                values = np.frombuffer(file.read(count * image_bytes), dtype)
                whole = len(values) // image_bytes * image_bytes
                return values[:whole].reshape(-1, *shape[1:])
        except (OSError, ValueError):
            return None

    def is_whole(self) -> bool:
        """Whether report and model can be read; otherwise `dvc fetch` brings them."""
        paths = (f"{REPORT}/report.md", f"{MODEL}/model.json", f"{MODEL}/model.safetensors")
        return all(_read(self.files, path) is not None for path in paths)


def work_tree(folder: str = ".") -> AbstractFileSystem:
    return DirFileSystem(path=folder, fs=LocalFileSystem())


def read(
    files: AbstractFileSystem, *, name: str, baseline: str, revision: str = "", running: str = ""
) -> Record:
    """The record of the experiment whose files these are.

    Args:
        name: DVC's; empty: `experiment_name`.
        running: the stage that runs now, whose entry in dvc.lock is of its run before.

    Raises:
        RecordError: it isn't finished, or params.yaml was changed since.
    """
    values, lock = _yaml(files, PARAMS), _yaml(files, LOCK)
    # dvc.lock keeps entries of a matrix (sole@26) that params.yaml no longer names
    entries = (lock.get("stages") or {}).items()
    stages = {stage: entry for stage, entry in entries if stage != running and "@" not in stage}
    outs = {
        out["path"]: out["md5"].removesuffix(".dir")
        for stage in stages.values()
        for out in stage.get("outs", [])
    }
    if f"{METRICS}/evaluate.json" not in outs:
        raise UnfinishedError("its pipeline has not come to its end")
    _require_unchanged(values, stages)
    params = as_texts(dict(config.flatten(values)))
    return Record(
        name=name or experiment_name(params),
        baseline=baseline,
        revision=revision,
        params=params,
        metrics=_metrics(files),
        curves=_curves(files, values),
        outs=outs,
        files=files,
    )


def _require_unchanged(values: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    """Check that the stages ran with the parameters that params.yaml has now."""
    current = dict(config.flatten(values))
    for stage, entry in stages.items():
        locked = (entry.get("params") or {}).get(PARAMS) or {}
        for key, value in config.flatten(locked):
            if key in current and as_texts({key: current[key]}) != as_texts({key: value}):
                raise UnfinishedError(f"params.yaml was changed since: {key} was {value} in {stage}")


def _metrics(files: AbstractFileSystem) -> dict[str, float]:
    metrics: dict[str, float] = {}
    paths = sorted(files.glob(f"{METRICS}/*.json"))
    # the UI's comparison draws the metric that was logged first: the test accuracy
    for path in sorted(paths, key=lambda path: not path.endswith("evaluate.json")):
        for name, value in config.flatten(_json(files, path)):
            if isinstance(value, int | float) and math.isfinite(value):
                metrics[name] = float(value)
    for stage in TRAININGS:
        times = _json(files, f"{TIMES}/{stage}.json")
        if times.get("seconds") is not None:
            metrics[f"{stage}.seconds"] = float(times["seconds"])
    return metrics


def _json(files: AbstractFileSystem, path: str) -> dict[str, Any]:
    content = _read(files, path)
    try:
        values = json.loads(content or b"{}")
    except ValueError as error:
        raise RecordError(f"its {path} can't be read: {error}") from None
    return values if isinstance(values, dict) else {}


def _curves(files: AbstractFileSystem, values: Mapping[str, Any]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for training, path in _trainings(values).items():
        text = (_read(files, path) or b"").decode()
        for row in csv.DictReader(io.StringIO(text)):
            epoch = int(float(row.pop("epoch")))
            for name, value in row.items():
                curves.setdefault(f"{training}/{name}", []).append((epoch, float(value)))
    return curves


def _trainings(values: Mapping[str, Any]) -> dict[str, str]:
    """The files of the learning curves, by the name that a training's run has."""
    sole, static = (values.get(stage) or {} for stage in ("sole", "static"))
    items = [("sole", str(depth)) for depth in sole.get("depths") or ()]
    num_kept = static.get("num_kept") or static.get("kept") or ()  # `kept` in older experiments
    items += [("static", f"{rule}-{n}") for rule in static.get("rules") or () for n in num_kept]
    paths = {stage: f"plots/{stage}.csv" for stage in TRAININGS}
    return paths | {f"{stage}-{item}": f"plots/{stage}/{item}.csv" for stage, item in items}


def _yaml(files: AbstractFileSystem, path: str) -> dict[str, Any]:
    content = _read(files, path)
    if content is None:
        raise UnfinishedError(f"it has no {path}")
    try:
        values = yaml.load(content.decode(), config.Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise RecordError(f"its {path} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise RecordError(f"its {path} holds no keys with values")
    return values


def _read(files: AbstractFileSystem, path: str) -> bytes | None:
    try:
        content: bytes = files.cat_file(path)
    except OSError:  # it is missing, or in no cache
        return None
    return content
