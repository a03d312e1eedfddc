"""The files of a finished experiment, without training one."""

import json
from pathlib import Path

import yaml
from builders import small_pair

from pipeline.models import checkpoint

PNG = b"\x89PNG not really"


def write(folder: Path, *, gamma: float = 2, accuracy: float = 0.9, model: bool = True) -> Path:
    """params.yaml, dvc.lock, metrics, curves, figures, report, and a small model."""
    params = {"gamma": gamma, "seed": 0, "data": {"source": "digits"},
              "resnet": {"depth": 8, "std": [1, 2.5]}}  # fmt: skip
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    stages = {
        "prepare": {"outs": [_out("data/prepared", "aa" * 16 + ".dir")]},
        "finetune": {
            "params": {"params.yaml": {"gamma": gamma, "seed": 0}},
            "outs": [_out("models/finetune", f"{gamma}".ljust(32, "b") + ".dir"),
                     _out("metrics/times/finetune.json", "3")],
        },
        "evaluate": {"outs": [_out("metrics/evaluate.json", f"e{accuracy}")]},
        "report": {"params": {"params.yaml": {"gamma": gamma}}, "outs": [_out("report", "4.dir")]},
        "sole@26": {"params": {"params.yaml": {"seed": 7}}, "outs": [_out("models/sole/26", "5.dir")]},
    }  # fmt: skip
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    _json(folder / "metrics/prepare.json", {"data": {"train_images": 100}})
    evaluated = {"accuracy": accuracy, "full_accuracy": 0.95, "blocks_mean": 1.5, "num_blocks": 3,
                 "flops_mean": 6e6, "full_flops": 1e7, "flops_saved": 0.4, "unique_policies": 4.0,
                 "difficulty_spearman": None}  # fmt: skip
    _json(folder / "metrics/evaluate.json", evaluated)
    _json(folder / "metrics/baseline.json", {
        "baseline": {"accuracy": 0.95}, "sole": {"20": {"accuracy": 0.92, "flops": 5e6}},
        "static": {"first_1": {"accuracy": 0.8, "flops": 4e6, "blocks": 1}},
    })  # fmt: skip
    _json(folder / "metrics/times/finetune.json", {"seconds": 12.5, "images_per_second": 10})
    _text(folder / "plots/finetune.csv", "epoch,validation_accuracy\n1,0.5\n2,0.75\n")
    _text(folder / "plots/pretrain.csv", "epoch,train_accuracy\n")  # an imported stage's
    for name in ("plots/evaluate/policy.png", "report/policy.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    _text(folder / "report/report.md", f"# gamma {gamma}\n")
    if model:
        write_model(folder / "models/finetune")
    return folder


def write_model(folder: Path) -> None:
    checkpoint.save(small_pair(classes=("a", "b", "c"), image_size=8), folder)


def _out(path: str, md5: str) -> dict[str, str]:
    return {"path": path, "hash": "md5", "md5": md5}


def _json(path: Path, content: dict) -> None:
    _text(path, json.dumps(content))


def _text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
