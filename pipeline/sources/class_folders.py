"""Which folders of images are splits and which are classes, and which files are skipped."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.image_io import IMAGE_SUFFIXES
from pipeline.data.metadata import SPLITS, SplitName
from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import short_repr, truncate

SPLIT_NAMES: dict[str, SplitName] = {  # of folders, in any case
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
TOOL_FILES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}  # and names that begin with a dot
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, surrogates, separators of lines and paragraphs

Labelled = list[tuple[Path, int]]  # images, each with the index of its class


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The images of a folder by splits and classes."""

    folder: Path  # the root of all paths
    classes: tuple[str, ...]  # their names, sorted
    # the images of each split that has a folder; without such folders all are in train
    splits: dict[SplitName, Labelled]
    passed_over: tuple[str, ...]  # skipped files and links to folders, as paths below `folder`

    def check(self, shares: dict[SplitName, float]) -> None:
        """Refuse a split with neither a folder nor a share (which is drawn from train), or with both."""
        problems = []
        for split in (name for name in SPLITS if name != "train"):
            key = f"data.{split}_fraction"
            if split in self.splits and split in shares:
                problems.append(
                    f"{self.folder} has a folder of {split} images and {key} is {shares[split]}; set it "
                    "to null (or take the folder away, to draw them from train)"
                )
            if split not in self.splits and split not in shares:
                problems.append(f"{self.folder} has no {split}/ and {key} is null; set one")
        if problems:
            raise DataError("\n".join(problems))


def scan(folder: Path) -> Tree:
    """List the images of `folder/CLASS/...`, or of `folder/train/CLASS/...` and other splits' folders.

    A folder is a split when SPLIT_NAMES has its name and it holds folders itself. What systems and tools
    put beside images is skipped and not reported.

    Raises:
        DataError: the classes are ambiguous, one has no images, or a folder can't be listed.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 (it also answers for a name that no file can have)
        raise DataError(
            f"{truncate(folder)} is no folder; set data.folder to one with class folders in it"
        )
    split_folders = _split_folders(folder)
    first = split_folders.get("train", folder)
    classes = tuple(sorted(_class_folders(first)))
    passed_over: list[Path] = []
    if split_folders:
        passed_over += _loose_files(folder) + _beside_splits(folder, split_folders, classes)
    _require_several(first, classes)
    splits: dict[SplitName, Labelled] = {}
    for split, split_folder in (split_folders or {"train": folder}).items():
        splits[split], others = _images_of(split_folder, classes)
        passed_over += _loose_files(split_folder) + others
    names = sorted(path.relative_to(folder).as_posix() for path in passed_over)
    return Tree(folder=folder, classes=classes, splits=splits, passed_over=tuple(names))


def account(passed_over: Sequence[str]) -> str:
    """How many files were skipped, by suffix, with a few of their names."""
    ends = Counter(Path(name).suffix.lower() or "no ending" for name in passed_over)
    most = [f"{count} {short_repr(end)[1:-1]}" for end, count in ends.most_common(5)]
    most += ["others"] if len(ends) > 5 else []
    few = [short_repr(name) for name in passed_over[:3]] + (["..."] if len(passed_over) > 3 else [])
    return f"{len(passed_over):,} files are not read: {', '.join(most)} ({', '.join(few)})"


def _split_folders(folder: Path) -> dict[SplitName, Path]:
    """The folders of splits, train first; empty where the classes lie in `folder` itself."""
    split_folders: dict[SplitName, Path] = {}
    for path in _folders(folder):
        split = SPLIT_NAMES.get(path.name.casefold())
        if split is None or not _folders(path):  # with images alone in it, it is a class of that name
            continue
        if split in split_folders:
            both = f"{split_folders[split].name}/ and {path.name}/"
            raise DataError(f"{folder} has {both}, which are both {split}; keep one of them")
        split_folders[split] = path
    if split_folders and "train" not in split_folders:
        raise DataError(
            f"{folder} has {', '.join(p.name for p in split_folders.values())} but no train; add it"
        )
    return dict(sorted(split_folders.items(), key=lambda item: item[0] != "train"))


def _beside_splits(
    folder: Path, split_folders: dict[SplitName, Path], classes: Sequence[str]
) -> list[Path]:
    """The files in folders beside those of splits."""
    files: list[Path] = []
    for path in sorted(set(_folders(folder)) - set(split_folders.values())):
        if path.name.casefold() in SPLIT_NAMES:
            raise DataError(
                f"{path} has no class folders in it, so its images have no labels; sort them into "
                "folders of classes, or take it away"
            )
        if {inner.name for inner in _folders(path)} & set(classes):
            raise DataError(
                f"{path} has folders of the same classes as {split_folders['train'].name}/; rename it "
                "to validation or test if it is that, else take it away"
            )
        images, others = _walk(path)
        files += images + others
    return files


def _class_folders(folder: Path) -> set[str]:
    """The names of the folders in it."""
    names: dict[str, str] = {}
    for path in _folders(folder):
        if any(unicodedata.category(letter) in UNPRINTABLE for letter in path.name):
            raise DataError(
                f"{str(path)!r} is no name for a class, which reports show; rename it in UTF-8"
            )
        if folder.resolve().is_relative_to(path.resolve()):
            raise DataError(f"{path} links to a folder that it is in; remove the link")
        twin = names.setdefault(unicodedata.normalize("NFC", path.name), path.name)
        if twin != path.name:
            raise DataError(
                f"{folder} has two folders that are {path.name} to a reader, {twin!a} and "
                f"{path.name!a}; merge them, or rename one"
            )
    return set(names.values())


def _require_several(folder: Path, classes: Sequence[str]) -> None:
    if len(classes) >= 2:
        return
    inner = [path.name for name in classes for path in _folders(folder / name)]
    deeper = ""
    if inner:
        where = f"{folder / classes[0]} instead"
        deeper = f"; the classes seem to lie one folder deeper ({some(inner)}): name {where}"
    raise DataError(f"{folder} has {len(classes)} class folders; it takes two or more{deeper}")


def _images_of(folder: Path, classes: Sequence[str]) -> tuple[Labelled, list[Path]]:
    """The images of all classes, class by class, each with its label, and the other files."""
    folders = _class_folders(folder)
    if folders != set(classes):
        odd = sorted(folders.symmetric_difference(classes))
        names = ", ".join(n if unicodedata.is_normalized("NFC", n) else ascii(n) for n in odd)
        raise DataError(f"{folder} and train differ in their classes: {names}; add or remove these")
    images: Labelled = []
    passed_over: list[Path] = []
    folders_in: list[set[str]] = []  # of each class, those that hold images; "" for the class itself
    for label, name in enumerate(classes):
        class_images, others = _walk(folder / name)
        if not class_images:
            files = [path.relative_to(folder).as_posix() for path in others]
            but = f"; {account(files)}; save them in another format" if files else ""
            raise DataError(
                f"{folder / name} holds no image; add some or remove the folder (images end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}{but})"
            )
        below = (path.relative_to(folder / name).parts for path in class_images)
        folders_in.append({parts[0] if len(parts) > 1 else "" for parts in below})
        images += [(path, label) for path in class_images]
        passed_over += others
    _refuse_same_folders(folder, classes, set.intersection(*folders_in) - {""}, folders_in)
    return images, passed_over


def _refuse_same_folders(
    folder: Path, classes: Sequence[str], common: set[str], folders_in: Iterable[set[str]]
) -> None:
    """One folder in all of them may be a habit (`CLASS/images/`); several are the classes, or splits."""
    if len(common) < 2 or any("" in inner for inner in folders_in):
        return
    raise DataError(
        f"all of {some(classes)} in {folder} hold the same folders, {some(sorted(common))}; if the "
        f"former are splits, name them {', '.join(sorted(set(SPLIT_NAMES.values())))}, else put each "
        "class's images into its folder itself"
    )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_of_a_tool(name: str) -> bool:
    return name.startswith(".") or name.casefold() in TOOL_FILES


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not _is_of_a_tool(entry.name)]
    except OSError as error:
        raise DataError(f"{folder} can't be listed ({error.strerror}); {_LET_IN}") from None


def _folders(folder: Path) -> list[Path]:
    return sorted(folder / entry.name for entry in _entries(folder) if entry.is_dir())


def _loose_files(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _entries(folder) if not entry.is_dir()]


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files named as images, those in subfolders too, and all other files; both sorted.

    A broken link counts as an image, so that reading it ends in a message. Links to folders are not
    followed and count as other files.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be listed ({error.strerror}); {_LET_IN}") from None

    images: list[Path] = []
    others: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_of_a_tool(name)]
        others += [path for name in folders if (path := Path(parent, name)).is_symlink()]
        for path in (Path(parent, name) for name in files if not _is_of_a_tool(name)):
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return sorted(images), sorted(others)


_LET_IN = "let this user read it, or take it away"
