"""What a training shows while it runs."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, cast

from torch import Tensor
from tqdm import tqdm

from pipeline.data.split import ImageSplit
from pipeline.infra.processes import is_main
from pipeline.training.loop import Metrics

BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"


class Steps:
    """How far a stage is that trains nothing: a bar on a terminal, elsewhere nothing.

    Args:
        total: what makes all of it, in any unit; it may be told later.
    """

    def __init__(self, name: str, total: float = 0) -> None:
        self.all = total
        self.bar = tqdm(
            desc=name, total=total, disable=not _can_draw(), dynamic_ncols=True, bar_format=BAR
        )

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def total(self, amount: float) -> None:
        """So much makes all of it."""
        self.all = self.bar.total = amount
        self.bar.refresh()

    def step(self, amount: float = 1) -> None:
        """So much more is done."""
        self.bar.update(amount)

    def reach(self, done: float) -> None:
        """So much is done by now; more than all of it is shown as all."""
        self.bar.update(min(done, self.all) - self.bar.n)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line)
        sys.stdout.flush()

    def over(self, split: ImageSplit, passes: int = 1) -> ImageSplit:
        """The same images; each batch of them that is taken is a step for each of `passes` policies."""
        return cast(ImageSplit, _Watched(split, lambda taken: self.step(taken * passes)))


class _Watched:
    """A split whose batches are counted as they are taken."""

    def __init__(self, split: ImageSplit, taken: Callable[[int], None]) -> None:
        self.split = split
        self.taken = taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def __len__(self) -> int:
        return len(self.split)

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """As the split's, counted when the work on a batch is done."""
        for images in self.split.iter_batches(size):
            yield images
            self.taken(len(images))


class Progress:
    """How far a training is: on a terminal one bar for all of it, elsewhere a line for each epoch.

    A log file beside a terminal (`dvc repro > log`) gets the lines too.

    Args:
        steps: of an epoch.
        history: the epochs that are done already, when a training is resumed.
        step: the steps of the next one that are.
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
            self.bar.set_postfix_str(_shown(history[-1], self.IN_BAR))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()  # what comes next begins on a line of its own

    def step(self) -> None:
        """One more step is done."""
        self.bar.update()

    def note(self, message: str) -> None:
        """Say something while the bar stands."""
        if is_main():
            self.bar.write(f"{self.name}: {message}")

    def epoch_done(self, row: Metrics, seconds: float) -> None:
        """Say what the epoch gave on the validation images, `seconds` after the training began."""
        self.bar.set_postfix_str(_shown(row, self.IN_BAR))
        if self.lines:
            done = int(row["epoch"])
            left = seconds / done * (self.epochs - done)
            print(
                f"{self.name} epoch {done}/{self.epochs}: {_shown(row, self.IN_LINE)}, "
                f"{tqdm.format_interval(seconds)} elapsed, {tqdm.format_interval(left)} left",
                flush=True,
            )


def _can_draw() -> bool:
    """Whether standard error is a terminal that says how wide it is (in a container it may not)."""
    if not sys.stderr.isatty() or "CI" in os.environ:
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _shown(row: Metrics, names: Sequence[str]) -> str:
    """Metrics of the validation images, those of `names` that there are."""
    return ", ".join(
        f"{name.removesuffix('_mean')} {row[f'validation_{name}']:.4g}"
        for name in names
        if f"validation_{name}" in row
    )
