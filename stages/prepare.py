"""prepare: read or download the data set, split it, write it as uint8 arrays or lists of image files."""

from pathlib import Path

from pipeline.config import Data, Params
from pipeline.data import streaming
from pipeline.data.dataset import IMAGES, Dataset, save
from pipeline.data.metadata import SplitName
from pipeline.infra.resume import project_root
from pipeline.sources import cifar, class_folders, digits, image_folder
from pipeline.sources.class_folders import Tree
from pipeline.tracking.runs import stage_run
from stages.support.common import METRICS, PREPARED, require_seen, run, write_json

RAW = project_root() / "data/raw"  # archives, kept between runs and out of DVC and Git


def read(data: Data) -> Dataset:
    """The data set that params.yaml names; not a folder of images."""
    if data.source == "cifar10":
        return cifar.cifar10(RAW)
    if data.source == "cifar100":
        return cifar.cifar100(RAW)
    return digits.digits(image_size=data.image_size, shares=shares_of(data), seed=data.split_seed)


def shares_of(data: Data) -> dict[SplitName, float]:
    """The fractions of the splits that are drawn at random."""
    fractions: dict[SplitName, float | None] = {
        "validation": data.validation_fraction,
        "test": data.test_fraction,
    }
    return {name: fraction for name, fraction in fractions.items() if fraction is not None}


def write(data: Data) -> dict[str, int]:
    """Write data/prepared; counts of the images of each split, of classes, of skipped files."""
    shares, seed = shares_of(data), data.split_seed
    if data.source == "imagefolder_stream":
        tree = class_folders.scan(project_root() / IMAGES)
        listings = image_folder.imagefolder_stream(tree, shares=shares, seed=seed)
        streaming.save(listings, PREPARED, classes=tree.classes, image_size=data.image_size)
        counts = {f"{name}_images": len(split.paths) for name, split in listings.items()}
        return {**counts, "classes": len(tree.classes), "passed_over": _report_skipped(tree)}
    more = {}
    if data.source == "imagefolder":
        tree = class_folders.scan(Path(data.folder))
        require_seen(tree.folder, [path for images in tree.splits.values() for path, _ in images])
        dataset = image_folder.imagefolder(tree, image_size=data.image_size, shares=shares, seed=seed)
        more = {"passed_over": _report_skipped(tree)}
    else:
        dataset = read(data)
    save(dataset, PREPARED)
    counts = {f"{name}_images": len(split.labels) for name, split in dataset.splits.items()}
    return {**counts, "classes": len(dataset.classes), **more}


def _report_skipped(tree: Tree) -> int:
    if tree.passed_over:
        print(f"prepare: of {tree.folder} {class_folders.account(tree.passed_over)}", flush=True)
    return len(tree.passed_over)


def main(params: Params) -> None:
    """Write data/prepared and metrics/prepare.json."""
    with stage_run("prepare", params.flat()) as mlflow_run:
        about = write(params.data)
        write_json(METRICS / "prepare.json", {"data": about})  # DVC names them data.train_images, ...
        mlflow_run.log_metrics({name: n for name, n in about.items() if name != "classes"})
    print(f"prepare: {params.data.source}, " + ", ".join(f"{k} {v}" for k, v in about.items()))


if __name__ == "__main__":
    run(main)
