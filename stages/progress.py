"""What a training shows while it runs."""

import os
import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from pipeline.processes import is_main
from pipeline.training import Metrics


class Progress:
    """How far a training is: on a terminal one bar for all of it, elsewhere a line for each epoch.

    A log file beside a terminal (`dvc repro > log`) gets the lines too.

    Args:
        steps: of an epoch.
        history: the epochs that are done already, when a training is resumed.
        step: the steps of the next one that are.
    """

    IN_BAR = ("accuracy", "blocks_mean", "reward")  # what a narrow terminal has room for
    IN_LINE = ("accuracy", "reward", "blocks_mean", "unique_policies", "learnt_blocks")

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
