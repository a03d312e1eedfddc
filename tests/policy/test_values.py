"""Values fitted on validation images, and the learner that lets a ResNet train on the chosen paths."""

import pytest
import torch
from builders import NORMALISATION, make_split

from pipeline.flops import measure
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.policy.objectives import PolicyObjective
from pipeline.policy.value_learner import ValueLearner
from pipeline.policy.values import fit_values
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch
from pipeline.training.optim import make_optimizer

SPLIT = make_split(200)
PATHS = ("000", "100", "111")
BUDGETS = 5


@pytest.fixture
def networks() -> Networks:
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=8, width=4, num_classes=3).eval()
    policy_net = PolicyNet(
        num_blocks=3, depth=8, width=4, path_values=PathValues(PATHS, num_classes=3)
    ).eval()
    return Networks(resnet=resnet, policy_net=policy_net, normalisation=NORMALISATION)


def fit(networks: Networks):
    return fit_values(
        networks.policy_net,
        networks.resnet,
        SPLIT,
        normalisation=NORMALISATION,
        cost=measure(networks.resnet, networks.policy_net, SPLIT.image_size),
        block_shares=None,
    )


def test_fitted_probabilities_are_right_on_average(networks):
    """What any logistic regression with a bias promises on the images that it was fitted to."""
    class_logits, answers = fit(networks)
    correct = answers.argmax(dim=2) == SPLIT.labels  # [P, M]
    fitted = networks.policy_net.path_values.correct_prob(class_logits).mean(dim=0)
    assert torch.allclose(fitted, correct.float().mean(dim=1), atol=0.01)


def test_answers_are_those_of_the_executors(networks):
    class_logits, answers = fit(networks)
    assert class_logits.shape == (200, 3)
    execute = make_executor(networks)
    for path, answer in zip(networks.policy_net.path_values.mask, answers, strict=True):
        given = execute(SPLIT.images, path.expand(len(SPLIT), -1)).logits
        assert torch.allclose(given, answer, atol=1e-4)


def test_costs_are_the_shares_of_the_blocks(networks):
    fit(networks)
    assert networks.policy_net.path_values.costs.tolist() == pytest.approx([0, 1 / 3, 1])


def test_budget_within_the_dial_is_met(networks):
    class_logits, _ = fit(networks)
    values = networks.policy_net.path_values
    cost = measure(networks.resnet, networks.policy_net, SPLIT.image_size)
    low, high = values.dial[1, [0, -1]].tolist()
    assert low < high
    image = cost.full / len(SPLIT)  # one image more or fewer
    for budget in torch.linspace(low, high, BUDGETS).tolist():
        values.gamma.fill_(values.gamma_of(budget))
        spent = float(cost.of(values(class_logits) >= 0).mean())
        assert spent == pytest.approx(budget, rel=0.02, abs=2 * image)


def test_a_larger_gamma_never_costs_less(networks):
    gammas, flops = fit(networks) and networks.policy_net.path_values.dial
    assert (gammas.diff() >= 0).all()
    assert (flops.diff() >= 0).all()


def learner_of(networks: Networks, alpha: float = 0.8) -> ValueLearner:
    return ValueLearner(
        networks.resnet,
        networks.policy_net,
        optimizer=make_optimizer(
            "sgd", [{"params": list(networks.resnet.parameters()), "lr": 0.1}], weight_decay=0
        ),
        objective=PolicyObjective(gamma=2.0, alpha=alpha, entropy_coef=0.0),
        normalisation=NORMALISATION,
        image_size=SPLIT.image_size,
        precision="fp32",
        distillation=Distillation(
            networks.resnet, teacher_weight=0.0, normalisation=NORMALISATION, precision="fp32"
        ),
    )


def batch_of(noise: torch.Tensor) -> Batch:
    return Batch(images=NORMALISATION(SPLIT.images), labels=SPLIT.labels, noise=noise)


def test_a_step_moves_the_resnet_alone(networks):
    fit(networks)
    learner = learner_of(networks)
    learner.optimizer.param_groups[0]["lr"] = 0.1
    before = {name: tensor.clone() for name, tensor in networks.policy_net.state_dict().items()}
    weights = networks.resnet.fc.weight.clone()
    metrics = learner.step(batch_of(torch.rand(200, 2, generator=torch.Generator().manual_seed(0))))
    assert metrics.keys() == {"reward", "accuracy", "blocks"}
    assert not torch.equal(networks.resnet.fc.weight, weights)
    after = networks.policy_net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_image_takes_its_best_path_with_probability_alpha_else_another_one(networks):
    class_logits, _ = fit(networks)
    learner = learner_of(networks, alpha=0.75)
    noise = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    taken = learner._actions(class_logits, noise)
    best = learner.values(class_logits) >= 0
    same = (taken == best).all(dim=1)
    assert torch.equal(same, noise[:, 0] < 0.75)


def test_validation_is_that_of_the_deployed_pair(networks):
    learner = learner_of(networks)
    metrics = learner.validate(SPLIT)
    output = make_executor(networks)(SPLIT.images)
    correct = output.logits.argmax(dim=1) == SPLIT.labels
    assert metrics["accuracy"] == pytest.approx(float(correct.float().mean()))
    assert metrics["blocks_mean"] == pytest.approx(float(output.actions.float().sum(dim=1).mean()))
