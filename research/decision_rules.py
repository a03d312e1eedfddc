"""What a policy between two paths gains by its values: `python -m research.decision_rules`.

Takes models/finetune and data/prepared of a finished run with `policy_net.paths: [0, N]`, and lets other
rules choose between the same two answers, the policy network's own and the one with N blocks. Each rule
gives an image a score, and the images over a threshold run the blocks; the threshold is the one that
takes the budget on the validation images. Prints test accuracies.

Shapes: M images, F statistics, N classes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.dataset import load_split
from pipeline.data.metadata import SplitName
from pipeline.device import choose_device
from pipeline.flops import measure
from pipeline.inference.predict import logits_under, policy_outputs
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.path_values import PathValues, statistics_of
from pipeline.report.tables import markdown_table
from stages.support import common
from tools.command import Parser, command

STEPS = 2000  # of Adam, on all images at once; the reward has settled by then
LR = 0.05


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A split's images: what a decision sees of each, and which answer is correct."""

    statistics: Tensor  # [M, F]
    own: NDArray[np.bool_]  # [M], the policy network alone
    both: NDArray[np.bool_]  # [M], averaged with the ResNet's
    resnet: NDArray[np.bool_]  # [M], the ResNet's alone
    values: NDArray[np.float64]  # [M], by how much the values prefer the blocks


def answers_of(loaded: Checkpoint, split_name: SplitName) -> Answers:
    """Run both networks on every image of a split.

    Raises:
        UserError: the model does not choose between its own answer and one path.
    """
    resnet, policy_net = loaded.need_resnet(), loaded.need_policy_net()
    values = policy_net.path_values
    if values is None or not values.answers or len(values.mask) != 2:
        raise UserError(
            "models/finetune does not choose between two paths; set policy_net.paths: [0, 9]"
        )
    device = choose_device()
    resnet.to(device)
    policy_net.to(device)
    split = load_split(common.PREPARED, split_name, device)
    own = policy_outputs(policy_net, split, normalisation=loaded.normalisation)  # [M, N]
    blocks = values.mask[values.mask.any(dim=1)]  # [1, K]
    (run,) = logits_under(resnet, split, blocks, normalisation=loaded.normalisation)  # [M, N]
    rewards = values.rewards(own)  # [M, 2]
    with_blocks = int(values.mask.any(dim=1).nonzero())

    def correct(logits: Tensor) -> NDArray[np.bool_]:
        return (logits.argmax(dim=1) == split.labels).cpu().numpy()

    return Answers(
        statistics=statistics_of(values.average.log_probs(own)).cpu(),
        own=correct(own),
        both=correct(values.average(own, run)),
        resnet=correct(run),
        values=(rewards[:, with_blocks] - rewards[:, 1 - with_blocks]).double().cpu().numpy(),
    )


def policy_gradient(images: Answers, values: PathValues) -> nn.Linear:
    """A gate that sees the same statistics, trained on the expected reward of Eq. 3 itself.

    REINFORCE estimates that gradient from samples. With one gate it can be had exactly, so this is what
    REINFORCE tends to with more and more samples.
    """
    torch.manual_seed(0)
    gate = nn.Linear(images.statistics.shape[1], 1)
    cost, gamma = float(values.costs.max()), float(values.gamma)
    correct = torch.from_numpy(np.stack([images.own, images.both])).float()  # [2, M]
    free = torch.tensor([[1.0], [1 - cost**2]])  # the reward of a correct answer
    rewards = correct * free - (1 - correct) * gamma  # [2, M]
    optimizer = torch.optim.Adam(gate.parameters(), lr=LR)
    for _ in range(STEPS):
        keep_prob = torch.sigmoid(gate(images.statistics)).squeeze(1)  # [M]
        reward = ((1 - keep_prob) * rewards[0] + keep_prob * rewards[1]).mean()
        optimizer.zero_grad()
        (-reward).backward()
        optimizer.step()
    return gate


def scores_of(gate: nn.Linear, images: Answers) -> NDArray[np.float64]:
    with torch.no_grad():
        return gate(images.statistics).squeeze(1).double().numpy()


def add_options(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, default=common.FINETUNED)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.35, 0.4, 0.45])


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Print a line for each rule: test accuracy, and in brackets the FLOPs that test images took."""
    loaded = checkpoint.load(arguments.model)
    train, validation, test = (answers_of(loaded, name) for name in ("train", "validation", "test"))
    policy_net = loaded.need_policy_net()
    values = policy_net.path_values
    assert values is not None
    cost = measure(loaded.need_resnet(), policy_net, loaded.image_size or 0)
    own_cost, both_cost = (cost.of(values.mask.cpu()).sort().values / cost.full).tolist()
    on_train, on_validation = policy_gradient(train, values), policy_gradient(validation, values)
    draw = np.random.default_rng(0)
    rules = {
        "values, fitted on validation images": (validation.values, test.values),
        "its largest class probability": tuple(
            -images.statistics[:, 0].double().numpy() for images in (validation, test)
        ),
        "policy gradient on training images": tuple(scores_of(on_train, i) for i in (validation, test)),
        "policy gradient on validation images": tuple(
            scores_of(on_validation, i) for i in (validation, test)
        ),
        "chance": (draw.random(len(validation.own)), draw.random(len(test.own))),
    }
    rows = []
    for answer in ("both", "resnet"):
        for name, (of_validation, of_test) in rules.items():
            cells = []
            for budget in arguments.budgets:
                share = (budget - own_cost) / (both_cost - own_cost)  # of the images, that run blocks
                runs = of_test > np.quantile(of_validation, 1 - share)  # [M]
                accuracy = np.where(runs, getattr(test, answer), test.own).mean()
                flops = own_cost + runs.mean() * (both_cost - own_cost)
                cells.append(f"{100 * accuracy:.2f} % ({100 * flops:.1f} %)")
            of_both = {"both": "averaged", "resnet": "the ResNet's alone"}[answer]
            rows.append((name, of_both, *cells))
    header = ("decision by", "answer where blocks run", *(f"{100 * b:g} %" for b in arguments.budgets))
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
