"""How training went, epoch by epoch."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from pipeline.figures.style import BLUE, GREY, ORANGE, Rows, save


def learning_curves(path: Path, *, curriculum: Rows, finetune: Rows) -> None:
    """Accuracy, reward and kept blocks on training and validation images, over both stages."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    start = curriculum[-1]["epoch"] if curriculum else 0
    panels = (
        ("accuracy", "accuracy of the greedy policy", "train_accuracy"),
        ("reward", "reward of the greedy policy", "train_greedy_reward"),
        ("blocks_mean", "blocks kept per image", "train_blocks"),
    )
    for ax, (name, label, of_training) in zip(axes, panels, strict=True):
        for rows, offset in ((curriculum, 0), (finetune, start)):
            epochs = [row["epoch"] + offset for row in rows]
            first = rows is curriculum or not curriculum
            for key, colour, said in (
                (of_training, BLUE, "training"),
                (f"validation_{name}", ORANGE, "validation"),
            ):
                values = [row[key] for row in rows]
                ax.plot(epochs, values, color=colour, label=said if first else None)
        ax.axvline(start + 0.5, color=GREY, linestyle=":", linewidth=1)
        ax.set(xlabel="epoch (dotted: joint finetuning begins)", ylabel=label)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    save(figure, path)
