"""prepare: fetch or read the data set, split it, write it as uint8 arrays."""

from pathlib import Path

from pipeline import sources
from pipeline.data import Dataset, SplitName, save
from pipeline.params import Data, Params
from pipeline.resume import project_root
from pipeline.tracking.runs import stage_run
from stages.common import METRICS, PREPARED, run, write_json

RAW = project_root() / "data/raw"  # archives, kept between runs and out of DVC and Git


def read(data: Data) -> Dataset:
    """The data set that params.yaml names."""
    if data.source == "cifar10":
        return sources.cifar10(RAW)
    if data.source == "cifar100":
        return sources.cifar100(RAW)
    shares: dict[SplitName, float] = {}
    if data.validation_share is not None:
        shares["validation"] = data.validation_share
    if data.test_share is not None:
        shares["test"] = data.test_share
    if data.source == "imagefolder":
        return sources.imagefolder(
            Path(data.folder), image_size=data.image_size, shares=shares, seed=data.split_seed
        )
    return sources.digits(image_size=data.image_size, shares=shares, seed=data.split_seed)


def main(params: Params) -> None:
    """Write data/prepared and how many images each split has."""
    with stage_run("prepare", params.flat()) as mlflow_run:
        dataset = read(params.data)
        save(dataset, PREPARED)
        counts = {f"{name}_images": len(split.labels) for name, split in dataset.splits.items()}
        about = {**counts, "classes": len(dataset.classes)}
        write_json(METRICS / "prepare.json", {"data": about})  # DVC names them data.train_images, ...
        mlflow_run.log_metrics(counts)
    print(f"prepare: {params.data.source}, " + ", ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    run(main)
