"""Which blocks run for which images.

Shapes: M images, K blocks.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.figures.style import BLUE, ORANGE, save


def policy_overview(
    path: Path,
    *,
    actions: NDArray[np.bool_],
    labels: NDArray[np.int64],
    correct: NDArray[np.bool_],
    classes: Sequence[str],
    title: str,
) -> None:
    """Which blocks run, by class, and how many blocks right and wrong predictions took.

    Args:
        actions: [M, K] of the test images.
        labels: [M], the true classes.
        correct: [M], whether the prediction under the policy is right.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained"
    )
    _keep_share_by_class(left, actions, labels, classes)
    _blocks_by_outcome(right, actions.sum(axis=1), correct, actions.shape[1])
    figure.suptitle(title)
    save(figure, path)


def _keep_share_by_class(
    ax: Axes, actions: NDArray[np.bool_], labels: NDArray[np.int64], classes: Sequence[str]
) -> None:
    shown = range(min(len(classes), 20))
    shares = np.stack(
        [
            actions[labels == c].mean(axis=0) if (labels == c).any() else actions[0] * np.nan
            for c in shown
        ]
    )
    image = ax.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    ax.set(xlabel="block (1 is the first)", title="share of a class's images that run a block")
    ax.set_yticks(list(shown), [classes[c] for c in shown])
    step = max(1, actions.shape[1] // 15)
    ax.set_xticks(
        range(0, actions.shape[1], step), [str(k + 1) for k in range(0, actions.shape[1], step)]
    )
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def _blocks_by_outcome(
    ax: Axes, blocks: NDArray[np.int64], correct: NDArray[np.bool_], num_blocks: int
) -> None:
    bins = [k - 0.5 for k in range(num_blocks + 2)]
    for outcome, colour, said in ((correct, BLUE, "right"), (~correct, ORANGE, "wrong")):
        weights = np.full(outcome.sum(), 1 / max(1, outcome.sum()))
        label = f"{said} ({outcome.sum()} images)"
        ax.hist(blocks[outcome], bins, weights=weights, color=colour, alpha=0.55, label=label)
    used = blocks.min() - 1, blocks.max() + 1
    ax.set(xlabel="blocks kept", ylabel="share of these images", xlim=used)
    ax.set_title("blocks for right and wrong predictions")
    ax.margins(y=0.3)  # room for the legend
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="upper left")
