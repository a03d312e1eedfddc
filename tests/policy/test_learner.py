"""One step of policy learning against the exact gradient, by enumeration of what could be sampled."""

import itertools
import math

import pytest
import torch
from builders import NORMALISATION

from pipeline.models.policies import greedy_actions
from pipeline.policy import objectives
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


def gradient_of_step(
    noise: torch.Tensor,
    *,
    entropy_coef: float = 0.0,
    epoch: int | None = None,
    resnet: torch.nn.Module | None = None,
    finetune: bool = False,
    estimator: str = "self_critical",
    num_flips: int = 0,
    **options: object,
) -> torch.Tensor:
    """What one step on a single image leaves as the gradient of the logits."""
    policy_net = SameForAll()
    learner = PolicyLearner(
        resnet or RuleNet(),
        policy_net,
        optimizer=make_optimizer("sgd", [{"params": [policy_net.logits], "lr": 0.0}], weight_decay=0),
        objective=PolicyObjective(
            gamma=GAMMA, alpha=ALPHA, entropy_coef=entropy_coef, num_flips=num_flips,
            epochs_per_block=None if epoch is None else 1.0, estimator=estimator, **options,
        ),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=LABELS_ALONE if finetune else None,
    )  # fmt: skip
    learner.begin_epoch(epoch or 0)
    images = torch.zeros(1, 3, 8, 8)
    learner.step(Batch(images=images, labels=torch.zeros(1, dtype=torch.int64), noise=noise))
    return policy_net.logits.grad


def noise_that_samples(actions: torch.Tensor) -> torch.Tensor:
    """Below every s' where the block is to run, above it where not (s' lies in [0.2, 0.8])."""
    return torch.where(actions, 0.0, 0.999)[None]


def expected_reward(
    logits: torch.Tensor, correct: torch.Tensor | None = None, shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Over all policies; Eq. 3 written out, with the probability of the label and shares of blocks."""
    correct = is_correct(ALL_POLICIES).float() if correct is None else correct
    shares = torch.full((K,), 1 / K) if shares is None else shares
    prob = objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)
    weights = torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)
    kept = (ALL_POLICIES * shares).sum(dim=1)
    return (weights * (correct * (1 - kept**2) - (1 - correct) * GAMMA)).sum()


def test_the_expected_step_follows_the_exact_gradient_of_the_expected_reward():
    logits = START.clone().requires_grad_()
    exact = torch.autograd.grad(expected_reward(logits), logits)[0]
    prob = objectives.bounded_sampling_prob(torch.sigmoid(START), ALPHA)
    weights = torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)
    steps = torch.stack([gradient_of_step(noise_that_samples(a)) for a in ALL_POLICIES])
    torch.testing.assert_close(-(weights[:, None] * steps).sum(dim=0), exact)


@pytest.mark.parametrize("num_flips", [1, 2, 3, 7])  # more than there are is all
def test_the_expected_step_of_local_expectation_follows_the_exact_gradient(num_flips):
    logits = START.clone().requires_grad_()
    exact = torch.autograd.grad(expected_reward(logits), logits)[0]
    prob = objectives.bounded_sampling_prob(torch.sigmoid(START), ALPHA)
    weights = torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)
    scores = [torch.tensor([order]) / K for order in itertools.permutations(range(K))]
    steps = torch.stack(
        [
            sum(
                gradient_of_step(
                    torch.cat([noise_that_samples(a), score], dim=1),
                    estimator="local_expectation",
                    num_flips=num_flips,
                )
                for score in scores
            )
            / len(scores)
            for a in ALL_POLICIES
        ]
    )
    torch.testing.assert_close(-(weights[:, None] * steps).sum(dim=0), exact)


def test_a_soft_reward_and_shares_of_blocks_are_what_local_expectation_follows():
    shares = (0.2, 0.5, 0.3)
    logits = START.clone().requires_grad_()
    correct = torch.where(
        is_correct(ALL_POLICIES), math.e / (1 + math.e), 1 / (1 + math.e)
    )  # of RuleNet
    reward = expected_reward(logits, correct, torch.tensor(shares))
    exact = torch.autograd.grad(reward, logits)[0]
    prob = objectives.bounded_sampling_prob(torch.sigmoid(START), ALPHA)
    weights = torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)
    steps = torch.stack(
        [
            gradient_of_step(
                torch.cat([noise_that_samples(a), torch.zeros(1, K)], dim=1),
                estimator="local_expectation",
                num_flips=K,
                soft_reward=True,
                block_shares=shares,
            )
            for a in ALL_POLICIES
        ]
    )
    torch.testing.assert_close(-(weights[:, None] * steps).sum(dim=0), exact)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_local_expectation_tries_active_blocks_alone(epoch):
    noise = torch.cat([noise_that_samples(ALL_POLICIES[-1]), torch.tensor([[0.9, 0.5, 0.1]])], dim=1)
    gradient = gradient_of_step(noise, epoch=epoch, estimator="local_expectation", num_flips=7)
    assert ((gradient != 0) == (torch.arange(K) >= K - 1 - epoch)).all()


def expected_step(net: LinearNet, estimator: str, shares: tuple[float, ...] | None) -> torch.Tensor:
    """Ascent of the logits, the mean over the actions that may be sampled."""
    prob = objectives.bounded_sampling_prob(torch.sigmoid(START), ALPHA)
    weights = torch.where(ALL_POLICIES, prob, 1 - prob).prod(dim=1)
    steps = [
        gradient_of_step(
            noise_that_samples(a), resnet=net, finetune=True, estimator=estimator, block_shares=shares
        )
        for a in ALL_POLICIES
    ]
    return -(weights[:, None] * torch.stack(steps)).sum(dim=0)


def exact_step(net: LinearNet, shares: tuple[float, ...] | None) -> torch.Tensor:
    logits = START.clone().requires_grad_()
    correct = net.correct_prob(ALL_POLICIES.float())
    reward = expected_reward(logits, correct, None if shares is None else torch.tensor(shares))
    return torch.autograd.grad(reward, logits)[0]


@pytest.mark.parametrize("shares", [None, (0.2, 0.5, 0.3)])
@pytest.mark.parametrize(
    ("estimator", "net"),
    [("straight_through", LinearNet()), ("reinmax", LinearNet()), ("reinmax", FlatNet())],
)
def test_the_expected_step_by_slopes_is_the_exact_gradient_to_its_order(estimator, net, shares):
    step = expected_step(net, estimator, shares)
    torch.testing.assert_close(step, exact_step(net, shares), rtol=1e-4, atol=1e-6)


def test_straight_through_takes_a_block_whose_slope_is_nought_for_worthless():
    exact = exact_step(FlatNet(), None)
    assert exact[2] > 0
    assert expected_step(FlatNet(), "straight_through", None)[2] < 0


@pytest.mark.parametrize("logit", [-200.0, -50.0, 50.0, 200.0])
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
        gradient_of_step(noise_that_samples(ALL_POLICIES[0]), estimator="straight_through")
    with pytest.raises(ValueError, match=r"no estimator local_expectation where the ResNet learns"):
        gradient_of_step(
            noise_that_samples(ALL_POLICIES[0]), estimator="local_expectation", finetune=True
        )


def test_the_entropy_bonus_pushes_towards_one_half():
    greedy = greedy_actions(torch.sigmoid(START))
    bonus = gradient_of_step(noise_that_samples(greedy), entropy_coef=1.0)
    logits = START.clone().requires_grad_()
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum()
    torch.testing.assert_close(bonus, -torch.autograd.grad(entropy, logits)[0])
    assert ((bonus > 0) == (START > 0)).all()  # descent moves every logit towards 0


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_authors_bonus_reaches_blocks_that_are_not_active_yet(epoch):
    """Their loss: minus beta times the sum over all K of -p log p, the mean over the batch."""
    greedy = greedy_actions(torch.sigmoid(START)) | (torch.arange(K) < K - 1 - epoch)
    bonus = gradient_of_step(
        noise_that_samples(greedy), entropy="authors", entropy_coef=0.7, epoch=epoch
    )
    logits = START.clone().requires_grad_()
    prob = objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)
    loss = 0.7 * (prob * prob.log()).sum()
    torch.testing.assert_close(bonus, torch.autograd.grad(loss, logits)[0])
    assert (bonus[START > 0] > 0).all()  # descent moves what is kept towards dropping


@pytest.mark.parametrize(("epoch", "left"), [(0, 1.0), (1, 0.75), (3, 0.25)])
def test_the_entropy_bonus_falls_over_its_epochs(epoch, left):
    greedy = greedy_actions(torch.sigmoid(START))
    policy_net = SameForAll()
    learner = PolicyLearner(
        RuleNet(),
        policy_net,
        optimizer=make_optimizer("sgd", [{"params": [policy_net.logits], "lr": 0.0}], weight_decay=0),
        objective=PolicyObjective(gamma=GAMMA, alpha=ALPHA, entropy_coef=0.3, entropy_epochs=4),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=None,
    )
    learner.begin_epoch(epoch)
    labels = torch.zeros(1, dtype=torch.int64)
    learner.step(Batch(images=torch.zeros(1, 3, 8, 8), labels=labels, noise=noise_that_samples(greedy)))
    whole = gradient_of_step(noise_that_samples(greedy), entropy_coef=0.3)
    torch.testing.assert_close(policy_net.logits.grad, left * whole)


def test_the_marginal_entropy_bonus_is_the_slope_of_the_mean_policys_entropy():
    greedy = greedy_actions(torch.sigmoid(START))
    bonus = gradient_of_step(noise_that_samples(greedy), marginal_entropy_coef=0.3)
    logits = START.clone().requires_grad_()  # one image: the mean policy is its own
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum()
    torch.testing.assert_close(bonus, -0.3 * torch.autograd.grad(entropy, logits)[0])


@pytest.mark.parametrize("active", [None, torch.tensor([False, True, True])])
def test_marginal_entropy_loss_has_the_gradient_of_the_mean_policys_entropy(active):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keep_prob = torch.sigmoid(logits)
    mean = keep_prob.mean(dim=0)
    each = torch.distributions.Bernoulli(probs=mean).entropy()
    exact = torch.autograd.grad((each if active is None else each[active]).sum(), logits)[0]
    keep_prob = torch.sigmoid(logits)
    parts = [objectives.marginal_entropy_loss(part, mean, active) / 2 for part in keep_prob.split(3)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], -exact)


def test_marginal_entropy_loss_stays_finite_where_everybody_agrees():
    keep_prob = torch.ones(2, 3, requires_grad=True)
    objectives.marginal_entropy_loss(keep_prob, torch.tensor([1.0, 0.0, 0.5])).backward()
    assert torch.isfinite(keep_prob.grad).all()


def test_sampling_the_greedy_policy_teaches_nothing():
    greedy = greedy_actions(torch.sigmoid(START))
    assert not gradient_of_step(noise_that_samples(greedy)).any()


def test_the_two_kinds_of_batch_statistics_make_no_advantage_of_the_same_policy():
    greedy = greedy_actions(torch.sigmoid(START))
    same = gradient_of_step(noise_that_samples(greedy), resnet=ModeNet(), finetune=True)
    other = gradient_of_step(noise_that_samples(~greedy), resnet=ModeNet(), finetune=True)
    assert not same.any()
    assert other.any()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_curriculum_lets_gradients_reach_active_blocks_alone(epoch):
    other = ~greedy_actions(torch.sigmoid(START))
    gradient = gradient_of_step(noise_that_samples(other), entropy_coef=0.1, epoch=epoch)
    active = torch.arange(K) >= K - 1 - epoch
    assert ((gradient != 0) == active).all()


def test_metrics_are_those_of_the_step():
    policy_net = SameForAll()
    learner = PolicyLearner(
        RuleNet(),
        policy_net,
        optimizer=make_optimizer("sgd", [{"params": [policy_net.logits], "lr": 0.0}], weight_decay=0),
        objective=PolicyObjective(gamma=GAMMA, alpha=ALPHA, entropy_coef=0.0),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=None,
    )
    learner.begin_epoch(0)
    wrong = torch.tensor([True, True, False])
    metrics = learner.step(
        Batch(
            images=torch.zeros(2, 3, 8, 8),
            labels=torch.zeros(2, dtype=torch.int64),
            noise=torch.cat([noise_that_samples(wrong), noise_that_samples(ALL_POLICIES[-1])]),
        )
    )
    greedy = greedy_actions(torch.sigmoid(START))  # block 1 dropped: correct, two of three blocks
    assert greedy.tolist() == [True, False, True]
    assert metrics["greedy_reward"].item() == pytest.approx(1 - 4 / 9)
    assert metrics["reward"].item() == pytest.approx((-GAMMA + 0.0) / 2)
    assert metrics["blocks"].item() == 2
    prob = torch.sigmoid(START)
    entropy = -(prob * prob.log() + (1 - prob) * (1 - prob).log()).mean()
    assert metrics["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert metrics["entropy"].item() < math.log(2)
