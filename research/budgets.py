"""Two models with policies between paths, at equal budgets: `python -m research.budgets MODEL OTHER`.

Each model takes the gamma under which the validation images took the budget. Both see the same test
images, so the difference of their accuracies is paired. A budget is a fraction of the FLOPs of MODEL's
ResNet with every block, for both of them, so OTHER may be a pruned one.

Shapes: M images, P paths.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import load_split
from pipeline.device import choose_device
from pipeline.evaluation.dial import PathOutcomes, at_budget, outcomes_of_paths
from pipeline.flops import Cost, measure
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.path_values import PathValues
from pipeline.report.paired import paired_difference
from pipeline.report.tables import markdown_table
from stages.support import common
from tools.command import Parser, command


class Model:
    """A trained pair on the test images, run once on every path."""

    def __init__(self, folder: Path) -> None:
        loaded = checkpoint.load(folder)
        self.resnet, policy_net = loaded.need_resnet(), loaded.need_policy_net()
        if policy_net.path_values is None:
            raise UserError(f"{folder} decides block by block; budgets take policy_net.paths")
        self.values: PathValues = policy_net.path_values
        device = choose_device()
        self.resnet.to(device)
        policy_net.to(device)
        split = load_split(common.PREPARED, "test", device)
        self.cost: Cost = measure(self.resnet, policy_net, loaded.image_size or 0)
        self.outcomes: PathOutcomes = outcomes_of_paths(
            policy_net, self.resnet, split, normalisation=loaded.normalisation
        )

    def at(self, budget: float) -> tuple[NDArray[np.bool_], float]:
        """Whether each test image is classified correctly, [M], and the mean FLOPs that they took.

        Raises:
            UserError: no gamma takes this budget.
        """
        correct, point = at_budget(self.values, self.outcomes, budget=budget, cost=self.cost)
        return correct.cpu().numpy(), point.flops


def add_options(parser: Parser) -> None:
    parser.add_argument("model", type=Path, help="a checkpoint folder of both networks")
    parser.add_argument("other", type=Path, help="another one")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.3, 0.35])


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print a line for each budget."""
    first, second = Model(arguments.model), Model(arguments.other)
    rows = []
    for budget in arguments.budgets:
        (right, flops), (other_right, other_flops) = (
            m.at(budget * first.cost.full) for m in (first, second)
        )
        difference = paired_difference(other_right, right)
        low, high = 100 * difference.low, 100 * difference.high
        rows.append(
            (
                f"{100 * budget:g} %",
                *(
                    f"{100 * r.mean():.2f} % ({100 * f / first.cost.full:.1f} %)"
                    for r, f in ((right, flops), (other_right, other_flops))
                ),
                f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f})",
            )
        )
    header = ("budget", str(arguments.model), str(arguments.other), "the other minus it (95 %)")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
