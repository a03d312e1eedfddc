"""How far the authors' entropy turns the policy's gradient: `python -m tools.entropy_gradients`.

One step of the authors' curriculum (preset cifar10_resnet32) on 2,048 training images, with the frozen
ResNet of pretrained/ and fresh policy networks. Under the same sampled actions, the cosine between the
policy network's gradient with the authors' entropy and with another: each of its three differences
taken back by itself, ours, none. Mean and standard deviation over seeds. Needs data/prepared, as
tools.ablation does.
"""

from statistics import mean, stdev

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
from pipeline.training.loop import Batch
from research.ablation import in_memory, preset_of
from stages import curriculum
from stages.support import common
from tools.command import Parser, mendable

SEEDS = range(3)
BLOCKS = (1, 8, 15)  # learnt ones, of 15


def bonuses(decisions: PolicyOutput, learnt: Tensor) -> dict[str, Tensor]:
    """Forms of the entropy, each the mean over the batch; the authors' first."""
    prob, keep_prob = decisions.sampling_prob, torch.sigmoid(decisions.logits)
    each = torch.special.entr(prob)
    forms = {
        "authors": each,
        "of s, not s'": torch.special.entr(keep_prob),
        "both terms": each + torch.special.entr(1 - prob),
        "learnt blocks alone": each * learnt,
    }
    bonus = {name: form.sum(dim=1).mean() for name, form in forms.items()}
    bonus["binary (all three)"] = pg.entropy(decisions.logits, learnt).mean()
    return bonus | {"none": torch.zeros(())}


def cosines(learner: PolicyLearner, batch: Batch) -> dict[str, float]:
    """Between the gradient of a step with the authors' entropy and with each other form."""
    learner.policy_net.train()
    decisions = learner.decide(batch)
    loss, _ = learner.estimator(batch, decisions)
    weights = list(learner.policy_net.parameters())
    gradients = {}
    for name, bonus in bonuses(decisions, learner.active).items():
        whole = loss - learner.entropy_coef * bonus
        parts = torch.autograd.grad(whole, weights, retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts])
    first = gradients.pop("authors")
    return {name: float(F.cosine_similarity(first, other, dim=0)) for name, other in gradients.items()}


def main() -> None:
    """Print a table: a row for each form, a column for each number of learnt blocks."""
    Parser(description=__doc__).parse_args()
    with mendable():
        compare()


def compare() -> None:
    """Measure and print."""
    params = preset_of("cifar10_resnet32")
    start = checkpoint.load(project_root() / "pretrained/pretrain")
    count = params.curriculum.batch_size
    train = in_memory(load_split(common.PREPARED, "train", torch.device("cpu")), count)
    images = start.normalisation(train.images)
    print("| with | " + " | ".join(f"{blocks} learnt" for blocks in BLOCKS) + " |")
    print("|---" * (1 + len(BLOCKS)) + "|")
    found: dict[str, list[list[float]]] = {}
    for index, blocks in enumerate(BLOCKS):
        for seed in SEEDS:
            seed_everything(seed, "entropy_gradients")
            learner = curriculum.learner_of(params, start.need_resnet(), start.normalisation)
            learner.begin_epoch(blocks - 1)
            noise = torch.rand(count, learner.noise_columns, generator=generator(seed, "noise"))
            batch = Batch(images=images, labels=train.labels, noise=noise)
            for name, cosine in cosines(learner, batch).items():
                found.setdefault(name, [[] for _ in BLOCKS])[index].append(cosine)
    for name, columns in found.items():
        cells = (f"{mean(values):.3f} +- {stdev(values):.3f}" for values in columns)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
