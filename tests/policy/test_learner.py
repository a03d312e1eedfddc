"""One step of policy learning against the exact gradient, by enumeration of what could be sampled."""

import itertools
import math

import pytest
import torch
from builders import NORMALISATION

from pipeline.models.policies import greedy_actions
from pipeline.policy import objectives
from pipeline.policy.estimators import StepMetrics
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch
from pipeline.training.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("stand_ins", "gates")

K = 3
ALPHA, GAMMA = 0.8, 2.0
ALL_POLICIES = torch.tensor(list(itertools.product([0, 1], repeat=K))).bool()  # [8, K]
START = torch.tensor([0.6, -0.3, 1.1])
GREEDY = greedy_actions(torch.sigmoid(START))
SHARES = (0.2, 0.5, 0.3)  # of the blocks in the cost


def is_correct(actions: torch.Tensor) -> torch.Tensor:
    return actions[:, 2] & (actions[:, 0] | ~actions[:, 1])


class RuleNet(torch.nn.Module):
    """Predicts class 0 (the true one) where the actions are correct, else class 1."""

    num_blocks = K

    def forward(self, images, actions=None):
        correct = is_correct(actions).float()
        return torch.stack([correct, 1 - correct], dim=1)


class ModeNet(RuleNet):
    """Correct in evaluation mode, wrong in training mode, as batch statistics can make a network."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))  # that a loss may be differentiated

    def forward(self, images, actions=None):
        correct = torch.full((len(images),), float(not self.training)) + self.nothing
        return torch.stack([correct, 1 - correct], dim=1)


LABELS_ALONE = Distillation(RuleNet(), teacher_weight=0.0, normalisation=NORMALISATION, precision="fp32")


class LinearNet(RuleNet):
    """The label's probability falls by so much for each block that does not run."""

    SLOPES = torch.tensor([0.1, 0.02, 0.3])

    def correct_prob(self, kept):
        return 0.9 - (1 - kept) @ self.SLOPES

    def forward(self, images, actions):
        return self.logits(actions.float())

    def logits(self, kept):
        correct = self.correct_prob(kept)
        return torch.stack([correct, 1 - correct], dim=1).log()

    def forward_with_gates(self, actions, *, try_dropped):
        gates = torch.ones(actions.shape, requires_grad=True)
        # the gates are 1, and their slope is that of the fraction of a block that runs
        return self.logits(actions.float() + (gates - 1) * (1 if try_dropped else actions)), gates


class FlatNet(LinearNet):
    """Where a block runs a little more or less of it makes no difference, as after training."""

    def correct_prob(self, kept):
        return 0.9 - (1 - kept).square() @ self.SLOPES


@pytest.fixture
def gates(monkeypatch) -> None:
    """Gates of the networks above, which have no blocks."""
    monkeypatch.setattr(
        "pipeline.policy.trained_resnet.forward_with_gates",
        lambda net, images, actions, *, try_dropped: net.forward_with_gates(
            actions, try_dropped=try_dropped
        ),
    )


class SameForAll(torch.nn.Module):
    """A policy network whose logits are its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(START.clone())

    def forward(self, images):
        return self.logits.expand(len(images), K)


def make_learner(
    *,
    resnet: torch.nn.Module | None = None,
    finetune: bool = False,
    entropy_coef: float = 0.0,
    epoch: int = 0,
    **options: object,
) -> PolicyLearner:
    policy_net = SameForAll()
    learner = PolicyLearner(
        resnet or RuleNet(),
        policy_net,
        optimizer=make_optimizer("sgd", [{"params": [policy_net.logits], "lr": 0.0}], weight_decay=0),
        objective=PolicyObjective(gamma=GAMMA, alpha=ALPHA, entropy_coef=entropy_coef, **options),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=LABELS_ALONE if finetune else None,
    )
    learner.begin_epoch(epoch)
    return learner


def step(learner: PolicyLearner, noise: torch.Tensor) -> StepMetrics:
    images = torch.zeros(len(noise), 3, 8, 8)
    labels = torch.zeros(len(noise), dtype=torch.int64)
    return learner.step(Batch(images=images, labels=labels, noise=noise))


def gradient_of_step(noise: torch.Tensor, **options: object) -> torch.Tensor:
    """What one step leaves as the gradient of the logits."""
    learner = make_learner(**options)
    step(learner, noise)
    return learner.policy_net.logits.grad


def noise_that_samples(actions: torch.Tensor) -> torch.Tensor:
    """Below every s' where the block is to run, above it where not (s' lies in [0.2, 0.8])."""
    return torch.where(actions, 0.0, 0.999)[None]


def probability_of_each(logits: torch.Tensor) -> torch.Tensor:
    """With which each of ALL_POLICIES is sampled, [8]."""
    prob = objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)
    return torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)


def exact_step(
    correct: torch.Tensor | None = None, shares: tuple[float, ...] | None = None
) -> torch.Tensor:
    """The gradient of the expected reward, Eq. 3 written out; `correct` may be a probability, [8]."""
    logits = START.clone().requires_grad_()
    correct = is_correct(ALL_POLICIES).float() if correct is None else correct
    kept = (ALL_POLICIES * torch.tensor(shares or K * (1 / K,))).sum(dim=1)
    rewards = correct * (1 - kept**2) - (1 - correct) * GAMMA
    return torch.autograd.grad((probability_of_each(logits) * rewards).sum(), logits)[0]


def expected_step(*more_noise: torch.Tensor, **options: object) -> torch.Tensor:
    """Ascent of the logits, the mean over the actions that may be sampled."""
    noises = [torch.cat([noise_that_samples(a), *more_noise], dim=1) for a in ALL_POLICIES]
    steps = torch.stack([gradient_of_step(noise, **options) for noise in noises])
    return -(probability_of_each(START)[:, None] * steps).sum(dim=0)


def test_expected_step_of_self_critical_is_exact():
    torch.testing.assert_close(expected_step(), exact_step())


@pytest.mark.parametrize("num_flips", [1, 2, 7])  # more than there are is all
def test_expected_step_of_local_expectation_is_exact(num_flips):
    orders = list(itertools.permutations(range(K)))
    steps = [
        expected_step(torch.tensor([order]) / K, estimator="local_expectation", num_flips=num_flips)
        for order in orders
    ]
    torch.testing.assert_close(sum(steps) / len(orders), exact_step())


def test_local_expectation_follows_a_soft_reward_and_shares():
    sure, unsure = math.e / (1 + math.e), 1 / (1 + math.e)  # RuleNet's probabilities
    step = expected_step(
        torch.zeros(1, K),
        estimator="local_expectation",
        num_flips=K,
        soft_reward=True,
        block_shares=SHARES,
    )
    exact = exact_step(torch.where(is_correct(ALL_POLICIES), sure, unsure), SHARES)
    torch.testing.assert_close(step, exact)


@pytest.mark.parametrize(
    ("estimator", "net", "shares"),
    [
        ("straight_through", LinearNet(), SHARES),
        ("reinmax", LinearNet(), None),
        ("reinmax", FlatNet(), SHARES),
    ],
)
def test_expected_step_by_slopes_is_exact_to_its_order(estimator, net, shares):
    step = expected_step(resnet=net, finetune=True, estimator=estimator, block_shares=shares)
    exact = exact_step(net.correct_prob(ALL_POLICIES.float()), shares)
    torch.testing.assert_close(step, exact, rtol=1e-4, atol=1e-6)


def test_straight_through_misses_a_block_of_no_slope():
    net = FlatNet()
    assert exact_step(net.correct_prob(ALL_POLICIES.float()))[2] > 0
    assert expected_step(resnet=net, finetune=True, estimator="straight_through")[2] < 0


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_slopes_stay_finite_where_the_policy_is_certain(logit):
    logits = torch.full((2, 3), logit, requires_grad=True)
    prob = torch.sigmoid(logits)
    for actions in (torch.zeros(2, 3).bool(), torch.ones(2, 3).bool()):
        gradient = objectives.reward_gradient(
            torch.full((2,), 0.9),
            torch.full((2, 3), -3.0),
            actions,
            prob.detach(),
            10.0,
            trapezoidal=True,
        )
        objectives.expectation_loss(gradient, torch.sigmoid(logits)).backward()
    assert torch.isfinite(logits.grad).all()


def test_an_estimator_that_does_not_fit_the_resnet_is_refused():
    with pytest.raises(ValueError, match=r"no estimator straight_through where the ResNet is frozen"):
        make_learner(estimator="straight_through")
    with pytest.raises(ValueError, match=r"no estimator local_expectation where the ResNet learns"):
        make_learner(estimator="local_expectation", finetune=True)


@pytest.mark.parametrize(
    ("options", "coefficient"),
    [
        ({"entropy_coef": 1.0}, 1.0),
        ({"entropy_coef": 0.3, "entropy_epochs": 4, "epoch": 3}, 0.3 / 4),  # it falls over its epochs
        ({"marginal_entropy_coef": 0.3}, 0.3),  # one image: the mean policy is its own
    ],
)
def test_the_bonus_is_the_slope_of_the_entropy(options, coefficient):
    bonus = gradient_of_step(noise_that_samples(GREEDY), **options)
    logits = START.clone().requires_grad_()
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum()
    torch.testing.assert_close(bonus, -coefficient * torch.autograd.grad(entropy, logits)[0])


@pytest.mark.parametrize("epoch", [0, 2])
def test_authors_bonus_reaches_blocks_not_active_yet(epoch):
    """Their loss: minus beta times the sum over all K of -p log p, the mean over the batch."""
    noise = noise_that_samples(GREEDY | (torch.arange(K) < K - 1 - epoch))
    authors = {"entropy": "authors", "entropy_coef": 0.7}
    bonus = gradient_of_step(noise, epoch=epoch, epochs_per_block=1.0, **authors)
    logits = START.clone().requires_grad_()
    prob = objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)
    loss = 0.7 * (prob * prob.log()).sum()
    torch.testing.assert_close(bonus, torch.autograd.grad(loss, logits)[0])
    assert (bonus[START > 0] > 0).all()  # descent moves what is kept towards dropping


@pytest.mark.parametrize("active", [None, torch.tensor([False, True, True])])
def test_marginal_entropy_loss_has_the_exact_gradient(active):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keep_prob = torch.sigmoid(logits)
    mean = keep_prob.mean(dim=0)
    each = torch.distributions.Bernoulli(probs=mean).entropy()
    exact = torch.autograd.grad((each if active is None else each[active]).sum(), logits)[0]
    keep_prob = torch.sigmoid(logits)
    parts = [objectives.marginal_entropy_loss(part, mean, active) / 2 for part in keep_prob.split(3)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], -exact)


def test_marginal_entropy_loss_stays_finite():
    keep_prob = torch.ones(2, 3, requires_grad=True)
    objectives.marginal_entropy_loss(keep_prob, torch.tensor([1.0, 0.0, 0.5])).backward()
    assert torch.isfinite(keep_prob.grad).all()


@pytest.mark.parametrize("options", [{}, {"resnet": ModeNet(), "finetune": True}])
def test_sampling_the_greedy_policy_teaches_nothing(options):
    """Not even where the two passes differ in their batch statistics."""
    assert not gradient_of_step(noise_that_samples(GREEDY), **options).any()
    assert gradient_of_step(noise_that_samples(~GREEDY), **options).any()


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize(
    ("sampled", "options"),
    [
        (~GREEDY, {"entropy_coef": 0.1}),
        (ALL_POLICIES[-1], {"estimator": "local_expectation", "num_flips": 7}),
    ],
)
def test_the_curriculum_lets_gradients_reach_active_blocks_alone(sampled, options, epoch):
    noise = torch.cat([noise_that_samples(sampled), torch.tensor([[0.9, 0.5, 0.1]])], dim=1)
    gradient = gradient_of_step(noise, epoch=epoch, epochs_per_block=1.0, **options)
    assert ((gradient != 0) == (torch.arange(K) >= K - 1 - epoch)).all()


def test_metrics_are_those_of_the_step():
    wrong = torch.tensor([True, True, False])
    noise = torch.cat([noise_that_samples(wrong), noise_that_samples(ALL_POLICIES[-1])])
    metrics = step(make_learner(), noise)
    assert GREEDY.tolist() == [True, False, True]  # correct, with two of three blocks
    assert metrics["greedy_reward"].item() == pytest.approx(1 - 4 / 9)
    assert metrics["reward"].item() == pytest.approx((-GAMMA + 0.0) / 2)
    assert metrics["blocks"].item() == 2
    prob = torch.sigmoid(START)
    entropy = -(prob * prob.log() + (1 - prob) * (1 - prob).log()).mean()
    assert metrics["policy_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert metrics["policy_entropy"].item() < math.log(2)
