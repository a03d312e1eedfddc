"""prepare: fetch or read the data set, split it, write it as uint8 arrays, or as lists of its images."""

from pathlib import Path

from pipeline import sources, streaming
from pipeline.data import IMAGES, Dataset, save
from pipeline.params import Data, Params
from pipeline.prepared import SplitName
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
    shares = shares_of(data)
    if data.source == "imagefolder":
        return sources.imagefolder(
            Path(data.folder), image_size=data.image_size, shares=shares, seed=data.split_seed
        )
    return sources.digits(image_size=data.image_size, shares=shares, seed=data.split_seed)


def shares_of(data: Data) -> dict[SplitName, float]:
    """The shares of the splits that are drawn."""
    named: dict[SplitName, float | None] = {
        "validation": data.validation_share,
        "test": data.test_share,
    }
    return {name: share for name, share in named.items() if share is not None}


def write(data: Data) -> tuple[dict[str, int], int]:
    """Write data/prepared; how many images each split has, and how many classes there are."""
    if data.source == "imagefolder_stream":
        classes, listings = sources.imagefolder_stream(
            project_root() / IMAGES, shares=shares_of(data), seed=data.split_seed
        )
        streaming.save(listings, PREPARED, classes=classes, image_size=data.image_size)
        return {f"{name}_images": len(split.paths) for name, split in listings.items()}, len(classes)
    dataset = read(data)
    save(dataset, PREPARED)
    counts = {f"{name}_images": len(split.labels) for name, split in dataset.splits.items()}
    return counts, len(dataset.classes)


def main(params: Params) -> None:
    """Write data/prepared and how many images each split has."""
    with stage_run("prepare", params.flat()) as mlflow_run:
        counts, classes = write(params.data)
        about = {**counts, "classes": classes}
        write_json(METRICS / "prepare.json", {"data": about})  # DVC names them data.train_images, ...
        mlflow_run.log_metrics(counts)
    print(f"prepare: {params.data.source}, " + ", ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    run(main)
