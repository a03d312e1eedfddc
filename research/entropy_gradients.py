"""How far the authors' entropy turns the policy's gradient: `python -m research.entropy_gradients`.

One step of the authors' curriculum (preset cifar10_resnet32) on 2,048 training images, with the frozen
ResNet of pretrained/ and fresh policy networks. Prints the cosine between the policy network's gradient
with the authors' entropy and its gradient with another form, under the same sampled actions. The other
forms undo each of the three differences from the binary entropy by itself, all three, and the whole
term. Mean and standard deviation over seeds. Needs data/prepared, as research.ablation does.
"""

import argparse

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import load_split
from pipeline.device import generator, seed_everything
from pipeline.infra.resume import project_root
from pipeline.models import checkpoint
from pipeline.policy import objectives as pg
from pipeline.policy.estimators import PolicyOutput
from pipeline.policy.learner import PolicyLearner
from pipeline.report.tables import markdown_table
from pipeline.training.loop import Batch
from research.ablation import in_memory
from research.tables import mean_and_std
from stages import curriculum
from stages.support import common
from tools import preset as presets
from tools.command import command

SEEDS = range(3)
NUM_ACTIVE = (1, 8, 15)  # blocks whose decision is learnt, of 15


def bonuses(decisions: PolicyOutput, active: Tensor) -> dict[str, Tensor]:
    """Forms of the entropy, each the mean over the batch; the authors' first."""
    prob, keep_prob = decisions.sampling_prob, torch.sigmoid(decisions.logits)
    kept_term = torch.special.entr(prob)  # [B, K]
    forms = {
        "authors": kept_term,
        "of s, not s'": torch.special.entr(keep_prob),
        "both terms": kept_term + torch.special.entr(1 - prob),
        "active blocks alone": kept_term * active,
    }
    bonus = {name: form.sum(dim=1).mean() for name, form in forms.items()}
    bonus["binary (all three)"] = pg.entropy(decisions.logits, active).mean()
    return bonus | {"none": torch.zeros(())}


def cosines(learner: PolicyLearner, batch: Batch) -> dict[str, float]:
    """Between the gradient of a step with the authors' entropy and with each other form."""
    learner.policy_net.train()
    decisions = learner.decide(batch)
    loss, _ = learner.estimator(batch, decisions)
    weights = list(learner.policy_net.parameters())
    gradients = {}
    for name, bonus in bonuses(decisions, learner.active).items():
        parts = torch.autograd.grad(loss - learner.entropy_coef * bonus, weights, retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts])  # [number of weights]
    authors = gradients.pop("authors")
    return {name: float(F.cosine_similarity(authors, g, dim=0)) for name, g in gradients.items()}


@command()
def main(_: argparse.Namespace) -> None:
    """Print a table: a row for each form, a column for each number of active blocks."""
    params = presets.load("cifar10_resnet32", project_root() / "presets")
    start = checkpoint.load(project_root() / "pretrained/pretrain")
    batch_size = params.curriculum.batch_size
    train = in_memory(load_split(common.PREPARED, "train", torch.device("cpu")), batch_size)
    images = start.normalisation(train.images)
    rows = []
    for num_active in NUM_ACTIVE:
        for seed in SEEDS:
            seed_everything(seed, "entropy_gradients")
            resnet = start.need_resnet()
            policy_net = curriculum.policy_net_of(params, resnet, num_classes=len(start.classes))
            learner = curriculum.learner_of(params, resnet, policy_net, start.normalisation)
            assert isinstance(learner, PolicyLearner)
            learner.begin_epoch(num_active - 1)
            noise = torch.rand(batch_size, learner.noise_columns, generator=generator(seed, "noise"))
            batch = Batch(images=images, labels=train.labels, noise=noise)
            rows += [
                {"form": form, "num_active": num_active, "cosine": cosine}
                for form, cosine in cosines(learner, batch).items()
            ]
    table = pd.DataFrame(rows).pivot_table(
        index="form", columns="num_active", values="cosine", sort=False,
        aggfunc=lambda values: mean_and_std(values, digits=3),
    )  # fmt: skip
    headers = ["with", *(f"{num_active} active" for num_active in NUM_ACTIVE)]
    print(markdown_table(headers, [[form, *cells] for form, *cells in table.itertuples()]))


if __name__ == "__main__":
    main()
