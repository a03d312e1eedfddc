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
    """The data set that params.yaml names, if its classes and images are known beforehand.

    Raises:
        ValueError: it is another source (`write` reads folders of images).
    """
    if data.source == "cifar10":
        return cifar.cifar10(RAW)
    if data.source == "cifar100":
        return cifar.cifar100(RAW)
    if data.source == "digits":
        return digits.digits(image_size=data.image_size, shares=fractions_of(data), seed=data.split_seed)
    raise ValueError(f"stages/prepare.py has no branch that reads the data source {data.source}")


def fractions_of(data: Data) -> dict[SplitName, float]:
    """The fractions of the images that become validation and test images, where they are drawn."""
    fractions: dict[SplitName, float | None] = {
        "validation": data.validation_fraction,
        "test": data.test_fraction,
    }
    return {name: fraction for name, fraction in fractions.items() if fraction is not None}


def write(data: Data) -> dict[str, int]:
    """Write data/prepared; return the numbers of images, classes and passed-over files."""
    fractions, seed = fractions_of(data), data.split_seed
    if data.source == "imagefolder_stream":
        tree = class_folders.scan(project_root() / IMAGES)
        listings = image_folder.imagefolder_stream(tree, shares=fractions, seed=seed)
        streaming.save(listings, PREPARED, classes=tree.classes, image_size=data.image_size)
        counts = {f"{name}_images": len(split.paths) for name, split in listings.items()}
        return {**counts, "classes": len(tree.classes), "passed_over": _report_passed_over(tree)}
    more = {}
    if data.source == "imagefolder":
        tree = class_folders.scan(Path(data.folder))
        require_seen(tree.folder, [path for images in tree.splits.values() for path, _ in images])
        dataset = image_folder.imagefolder(tree, image_size=data.image_size, shares=fractions, seed=seed)
        more = {"passed_over": _report_passed_over(tree)}
    else:
        dataset = read(data)
    save(dataset, PREPARED)
    counts = {f"{name}_images": len(split.labels) for name, split in dataset.splits.items()}
    return {**counts, "classes": len(dataset.classes), **more}


def _report_passed_over(tree: Tree) -> int:
    if tree.passed_over:
        print(f"prepare: of {tree.folder} {class_folders.account(tree.passed_over)}", flush=True)
    return len(tree.passed_over)


def main(params: Params) -> None:
    with stage_run("prepare", params.flat()) as mlflow_run:
        counts = write(params.data)
        write_json(METRICS / "prepare.json", {"data": counts})  # DVC names them data.train_images, ...
        mlflow_run.log_metrics({name: n for name, n in counts.items() if name != "classes"})
    print(f"prepare: {params.data.source}, " + ", ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    run(main)
