"""Progress bars on a terminal; in a log, a line for each epoch; in plots/, the learning curve so far."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor
from tqdm import tqdm

from pipeline.data.split import ImageSplit
from pipeline.infra.ranks import is_main
from pipeline.tracking import runs
from pipeline.training.loop import Metrics
from stages.support.common import PLOTS, write_csv

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"


class Bar:
    """A progress bar that is closed with its context: what comes next begins on a line of its own."""

    bar: tqdm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class Steps(Bar):
    """The bar of a stage that trains nothing, on a terminal; elsewhere nothing.

    Args:
        total: amount of all the work, in any unit; `total()` may set it later.
    """

    def __init__(self, name: str, total: float = 0) -> None:
        self.amount = total
        self.bar = tqdm(
            desc=name, total=total, disable=not _can_draw(), dynamic_ncols=True, bar_format=BAR_FORMAT
        )

    def total(self, amount: float) -> None:
        self.amount = self.bar.total = amount
        self.bar.refresh()

    def reach(self, done: float) -> None:
        self.bar.update(min(done, self.amount) - self.bar.n)

    def say(self, line: str) -> None:
        self.bar.write(line)
        sys.stdout.flush()

    def over(self, split: ImageSplit, passes: int = 1) -> ImageSplit:
        """The same images; a batch that is done counts `passes` times, once for each policy."""
        return cast(ImageSplit, _CountedSplit(split, lambda images: self.bar.update(images * passes)))


class _CountedSplit:
    """A split that counts the images of its batches when the work on them is done."""

    def __init__(self, split: ImageSplit, count: Callable[[int], object]) -> None:
        self.split = split
        self.count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def __len__(self) -> int:
        return len(self.split)

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """As the split's, counted when the work on a batch is done."""
        for images in self.split.iter_batches(size):
            yield images
            self.count(len(images))  # the caller asks for the next batch


class Progress(Bar):
    """The progress of a training: on a terminal one bar for all of it, elsewhere a line for each epoch.

    A log file beside a terminal (`dvc repro > log`) gets the lines too. After each epoch the learning
    curve so far is written where the stage writes the whole one, for `dvc plots show`. A training that
    stops before its end removes it: DVC asks before it replaces a file that it has not cached.

    Args:
        steps: of an epoch.
        history: rows of the epochs that are done already, when a training is resumed.
        step: how many steps of the next epoch are done.
    """

    IN_BAR = ("accuracy", "blocks_mean", "reward")  # what a narrow terminal has room for
    IN_LINE = ("accuracy", "reward", "blocks_mean", "unique_policies", "active_blocks")

    def __init__(
        self, name: str, *, epochs: int, steps: int, history: Sequence[Metrics], step: int = 0
    ) -> None:
        self.name = name
        self.epochs = epochs
        terminal = is_main() and _can_draw()
        self.lines = is_main() and not (terminal and sys.stdout.isatty())
        self.curve = curve_of(name)
        self.rows = list(history)
        self.bar = tqdm(
            desc=name,
            total=epochs * steps,
            initial=len(history) * steps + step,
            disable=not terminal,
            dynamic_ncols=True,
            smoothing=0,  # time left at the mean rate: validation between epochs is part of it
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )
        if history:
            self.bar.set_postfix_str(_summary(history[-1], self.IN_BAR))
            self._write_curve()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # without rows the file is of an earlier training, with all of them it is whole
        if is_main() and any(error) and 0 < len(self.rows) < self.epochs:
            with contextlib.suppress(OSError):
                self.curve.unlink(missing_ok=True)

    def step(self) -> None:
        self.bar.update()
        runs.sample()

    def note(self, message: str) -> None:
        if is_main():
            self.bar.write(f"{self.name}: {message}")

    def epoch_done(self, row: Metrics, seconds: float) -> None:
        """Show an epoch's validation metrics, `seconds` after the training began."""
        self.rows.append(row)
        self._write_curve()
        self.bar.set_postfix_str(_summary(row, self.IN_BAR))
        if self.lines:
            epoch = int(row["epoch"])
            left = seconds / epoch * (self.epochs - epoch)
            print(
                f"{self.name} epoch {epoch}/{self.epochs}: {_summary(row, self.IN_LINE)}, "
                f"{tqdm.format_interval(seconds)} elapsed, {tqdm.format_interval(left)} left",
                flush=True,
            )

    def _write_curve(self) -> None:
        if is_main():
            with contextlib.suppress(OSError):  # the disk is full, say: the stage tells it at its end
                write_csv(self.curve, self.rows)


def curve_of(name: str) -> Path:
    """The file of a training's learning curve: plots/STAGE.csv; of STAGE-ITEM plots/STAGE/ITEM.csv."""
    return PLOTS / f"{name.replace('-', '/', 1)}.csv"


def _can_draw() -> bool:
    """Whether standard error is a terminal that says how wide it is (in a container it may not)."""
    if not sys.stderr.isatty() or "CI" in os.environ:
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _summary(row: Metrics, names: Sequence[str]) -> str:
    """The validation metrics of these names, those that the row has."""
    return ", ".join(
        f"{name.removesuffix('_mean')} {row[f'validation_{name}']:.4g}"
        for name in names
        if f"validation_{name}" in row
    )
