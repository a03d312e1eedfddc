"""The loop: what is random, what moves, what is learnt, and that an interruption changes nothing."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from builders import NORMALISATION, make_split

from pipeline.data.split import Split, batches
from pipeline.data.transforms import Augmentation
from pipeline.device import generator
from pipeline.models.build import make_resnet
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.policy.learner import PolicyLearner, PolicyObjective
from pipeline.training.classification import Classification
from pipeline.training.distillation import Distillation, soft_targets
from pipeline.training.loop import Batch, NotFiniteError, Position, fit, require_finite
from pipeline.training.optim import (
    ChainedOptimizer,
    constant,
    cosine,
    make_optimizer,
    step_down,
    warmed_up,
)

PLAIN = Augmentation(crop_padding=0, flip=False)


def classifier(resnet: ResNet, lr: float = 0.05) -> Classification:
    return Classification(
        resnet,
        optimizer=make_optimizer(
            "sgd", [{"params": list(resnet.parameters()), "lr": lr}], weight_decay=0.0
        ),
        normalisation=NORMALISATION,
        precision="fp32",
    )


def policy_learner(
    resnet: ResNet,
    *,
    finetune: bool,
    epochs_per_block: float | None = None,
    gamma: float = 2.0,
    estimator: str = "self_critical",
    teacher_share: float = 0.0,
    alpha: float = 0.8,
    frozen_epochs: int = 0,
    train_epochs: int | None = None,
    entropy_epochs: int | None = None,
) -> PolicyLearner:
    torch.manual_seed(1)
    policy_net = PolicyNet(num_blocks=resnet.num_blocks, width=4)
    groups = [{"params": list(policy_net.parameters()), "lr": 0.01}]
    optimizer = make_optimizer("adam", groups, weight_decay=0.0)
    distillation = None
    if finetune:
        groups = [{"params": list(resnet.parameters()), "lr": 0.01}]
        optimizer = ChainedOptimizer(optimizer, make_optimizer("adam", groups, weight_decay=0.0))
        distillation = Distillation(
            resnet, share=teacher_share, normalisation=NORMALISATION, precision="fp32"
        )
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=optimizer,
        rules=PolicyObjective(
            gamma=gamma, alpha=alpha, entropy_coef=0.01, epochs_per_block=epochs_per_block,
            estimator=estimator, num_flips=2, frozen_epochs=frozen_epochs, train_epochs=train_epochs,
            entropy_epochs=entropy_epochs,
        ),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=distillation,
    )  # fmt: skip


def run(
    learner, train, validation, *, epochs, position=None, augmentation=PLAIN, steps=None, batch_size=16
):
    """The results of the epochs, with a stop after so many steps where that is asked for."""
    results, position = [], position or Position()
    todo = fit(
        learner,
        train=train,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        schedule=cosine,
        augmentation=augmentation,
        normalisation=NORMALISATION,
        key=(0, "test"),
        position=position,
    )
    done = 0
    for result in todo:
        if result is not None:
            results.append(result)
        else:
            done += 1
        if done == steps:
            break
    return results


def weights(*modules) -> list[torch.Tensor]:
    return [t.clone() for module in modules for t in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_classifier_learns(small_resnet, train_split, validation_split):
    results = run(classifier(small_resnet), train_split, validation_split, epochs=8)
    assert results[-1].validation["accuracy"] > 0.9
    assert results[-1].train["loss"] < results[0].train["loss"] / 2


@pytest.mark.parametrize("steps", [1, 5, 6, 7])  # an epoch has three: at its end, and in the middle
@pytest.mark.parametrize(
    ("finetune", "estimator"),
    [
        (False, "self_critical"),
        (False, "local_expectation"),
        (True, "self_critical"),
        (True, "straight_through"),
        (True, "reinmax"),
    ],
)
def test_resumed_training_ends_in_the_same_bytes(
    finetune, estimator, steps, train_split, validation_split
):
    augmentation = Augmentation(crop_padding=1, flip=True)

    def fresh() -> PolicyLearner:
        torch.manual_seed(0)
        resnet = cifar_resnet(depth=8, width=4, num_classes=3)
        return policy_learner(
            resnet, finetune=finetune, epochs_per_block=1, estimator=estimator, teacher_share=0.5,
            train_epochs=2 if estimator == "reinmax" else None,
        )  # fmt: skip

    whole = fresh()
    expected = run(whole, train_split, validation_split, epochs=4, augmentation=augmentation)
    first, position = fresh(), Position()
    options = {"epochs": 4, "augmentation": augmentation}
    before = run(first, train_split, validation_split, position=position, steps=steps, **options)
    assert (position.epoch, position.step) == ((steps - 1) // 3, (steps - 1) % 3 + 1)
    state = copy.deepcopy(
        ({k: m.state_dict() for k, m in first.modules.items()}, first.optimizer.state_dict(), position)
    )
    second = fresh()
    for name, module in second.modules.items():
        module.load_state_dict(state[0][name])
    second.optimizer.load_state_dict(state[1])
    found = run(second, train_split, validation_split, position=state[2], **options)
    assert same(weights(second.resnet, second.policy_net), weights(whole.resnet, whole.policy_net))
    assert before + found == expected


def test_position_moves_with_the_steps_and_holds_the_sums_of_the_epoch(small_resnet, train_split):
    position = Position()
    learner = classifier(small_resnet, lr=0.0)
    run(learner, train_split, train_split, epochs=1, position=position, steps=2)
    assert (position.epoch, position.step, int(position.finite)) == (0, 2, 2)
    assert set(position.totals) == {"loss", "accuracy"}
    (result,) = run(learner, train_split, train_split, epochs=1, position=position)
    assert (position.epoch, position.step, int(position.finite), position.totals) == (1, 0, 0, {})
    assert result.wrong_step is None


class Spoiled:
    """A learner whose loss is not a number from a step on."""

    def __init__(self, learner, step: int, value: float) -> None:
        self.learner, self.spoiled, self.value, self.done = learner, step, value, 0
        self.modules, self.optimizer = learner.modules, learner.optimizer
        self.normalisation, self.noise_columns = learner.normalisation, learner.noise_columns

    def begin_epoch(self, epoch: int) -> None:
        self.learner.begin_epoch(epoch)

    def step(self, batch):
        self.done += 1
        metrics = self.learner.step(batch)
        return metrics | {"loss": torch.tensor(self.value)} if self.done == self.spoiled else metrics

    def validate(self, split):
        return self.learner.validate(split)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoiled", [1, 2, 3])
def test_the_first_step_that_is_not_finite_is_named(spoiled, value, small_resnet, train_split):
    learner = Spoiled(classifier(small_resnet), 3 + spoiled, value)
    position = Position()
    first, second = run(learner, train_split, train_split, epochs=2, position=position)
    require_finite(learner, position, first)
    with pytest.raises(NotFiniteError, match=f"loss is not finite from step {spoiled} of epoch 2 on"):
        require_finite(learner, position, second)


def test_a_step_that_is_not_finite_is_named_in_the_middle_of_an_epoch(small_resnet, train_split):
    learner = Spoiled(classifier(small_resnet), 2, float("nan"))
    position = Position()
    run(learner, train_split, train_split, epochs=1, position=position, steps=1)
    require_finite(learner, position)
    learner.done = 1
    run(learner, train_split, train_split, epochs=1, position=position, steps=1)
    with pytest.raises(NotFiniteError, match="loss is not finite from step 2 of epoch 1 on"):
        require_finite(learner, position)


def test_weights_and_validation_that_are_not_finite_are_named(small_resnet, train_split):
    learner = classifier(small_resnet)
    position = Position()
    (result,) = run(learner, train_split, train_split, epochs=1, position=position)
    wrong = dataclasses.replace(result, validation={"accuracy": 0.5, "loss": float("inf")})
    with pytest.raises(NotFiniteError, match="validation loss is inf after epoch 1"):
        require_finite(learner, position, wrong)
    small_resnet.blocks[0].bn1.running_var[1] = float("nan")
    with pytest.raises(NotFiniteError, match=r"weight blocks.0.bn1.running_var is not finite"):
        require_finite(learner, position, result)


def test_the_curriculum_leaves_the_resnet_alone(small_resnet, train_split, validation_split):
    learner = policy_learner(small_resnet, finetune=False, epochs_per_block=1)
    before, policy_before = weights(small_resnet), weights(learner.policy_net)
    run(learner, train_split, validation_split, epochs=2)
    assert same(weights(small_resnet), before)
    assert not same(weights(learner.policy_net), policy_before)


def test_the_curriculum_gives_no_gradient_to_blocks_that_are_kept(small_resnet, train_split):
    learner = policy_learner(small_resnet, finetune=False, epochs_per_block=1)
    learner.begin_epoch(0)  # K = 3: only the last block is learnt
    images = NORMALISATION(train_split.images)
    noise = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))
    learner.step(Batch(images=images, labels=train_split.labels, noise=noise))
    gradient = learner.policy_net.features.fc.weight.grad
    assert not gradient[:2].any()
    assert gradient[2].any()


def test_validation_follows_the_curriculum(small_resnet, validation_split):
    learner = policy_learner(small_resnet, finetune=False, epochs_per_block=1)
    torch.nn.init.constant_(learner.policy_net.features.fc.bias, -50.0)  # would drop everything
    blocks = []
    for epoch in range(3):
        learner.begin_epoch(epoch)
        blocks.append(learner.validate(validation_split)["blocks_mean"])
    assert blocks == [2, 1, 0]


def test_finetuning_trains_both_networks(small_resnet, train_split, validation_split):
    learner = policy_learner(small_resnet, finetune=True)
    before, policy_before = weights(small_resnet.fc), weights(learner.policy_net.features.fc)
    results = run(learner, train_split, validation_split, epochs=8)
    assert not same(weights(small_resnet.fc), before)
    assert not same(weights(learner.policy_net.features.fc), policy_before)
    assert results[-1].validation["accuracy"] > 0.8
    assert results[-1].validation["reward"] > results[0].validation["reward"]


def gradients_of(learner: PolicyLearner, split: Split) -> list[torch.Tensor]:
    learner.begin_epoch(0)
    images = NORMALISATION(split.images)
    noise = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))
    learner.step(Batch(images=images, labels=split.labels, noise=noise))
    return [p.grad for p in learner.resnet.parameters() if p.grad is not None]


@pytest.mark.parametrize("estimator", ["self_critical", "straight_through", "reinmax"])
def test_the_resnet_learns_from_the_labels_as_without_a_policy(estimator, train_split):
    """The gates' gradients and the reward's reach the policy alone."""
    torch.manual_seed(0)
    one, other = (cifar_resnet(depth=8, width=4, num_classes=3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    learner = policy_learner(one, finetune=True, estimator=estimator)
    torch.nn.init.constant_(learner.policy_net.features.fc.bias, 50.0)  # alpha 0.8: 80 % are kept
    found = gradients_of(learner, train_split)
    noise = torch.rand(len(train_split), 3, generator=torch.Generator().manual_seed(0))
    images = NORMALISATION(train_split.images)
    loss = torch.nn.functional.cross_entropy(other.train()(images, noise < 0.8), train_split.labels)
    expected = torch.autograd.grad(loss, list(other.parameters()))
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
def test_after_its_epochs_the_policy_is_fixed_and_the_resnet_learns_on(
    estimator, train_split, validation_split, small_resnet
):
    learner = policy_learner(small_resnet, finetune=True, estimator=estimator, train_epochs=2)
    position, policy, resnet, rows = Position(), [], [], []
    for epochs in (1, 2, 3, 4):
        rows += run(learner, train_split, validation_split, epochs=epochs, position=position)
        policy.append(weights(learner.policy_net))
        resnet.append(weights(learner.resnet))
    assert not same(policy[0], policy[1])
    assert same(policy[1], policy[2])
    assert same(policy[1], policy[3])
    assert not any(same(one, other) for one, other in itertools.pairwise(resnet))
    assert rows[3].train.keys() == rows[0].train.keys()
    assert rows[3].train["policy_loss"] == 0 < rows[0].train["blocks"]


def parameters(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
def test_at_first_the_policy_is_held_and_the_resnet_learns(
    estimator, train_split, validation_split, small_resnet
):
    pace = {"frozen_epochs": 2, "train_epochs": 1, "entropy_epochs": 1}
    learner = policy_learner(small_resnet, finetune=True, estimator=estimator, **pace)
    position, policy, resnet = Position(), [parameters(learner.policy_net)], []
    rows, entropy_weights, statistics = [], [], []
    for epochs in (1, 2, 3, 4):
        rows += run(learner, train_split, validation_split, epochs=epochs, position=position)
        policy.append(parameters(learner.policy_net))
        statistics.append([buffer.clone() for buffer in learner.policy_net.buffers()])
        resnet.append(weights(learner.resnet))
        entropy_weights.append(learner.entropy_coef)
    assert same(policy[0], policy[1])
    assert same(policy[0], policy[2])
    assert not same(policy[2], policy[3])  # learnt in the third epoch
    assert same(policy[3], policy[4])  # and fixed
    assert not same(statistics[0], statistics[1])  # held, it decides by each batch, as when it learns
    assert same(statistics[2], statistics[3])
    assert not any(same(one, other) for one, other in itertools.pairwise(resnet))
    assert rows[0].train.keys() == rows[2].train.keys() == rows[3].train.keys()
    assert rows[0].train["policy_loss"] == 0
    assert entropy_weights == [0.01, 0.01, 0.01, 0]


def test_a_frozen_resnet_takes_no_held_policy(small_resnet):
    with pytest.raises(ValueError, match="nothing would learn"):
        policy_learner(small_resnet, finetune=False, frozen_epochs=1)


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "fixed"])
def test_beside_a_policy_that_waits_the_resnet_learns_on_the_paths(estimator, held, train_split):
    """On those sampled from a policy that is held, on those deployed once it is fixed."""
    torch.manual_seed(0)
    one, other = (cifar_resnet(depth=8, width=4, num_classes=3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    learner = policy_learner(
        one, finetune=True, estimator=estimator, frozen_epochs=int(held), train_epochs=1
    )
    torch.nn.init.constant_(learner.policy_net.features.fc.weight, 0.0)
    deployed, drawn = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.999, 0.999, 0.999])
    if held:  # the paths of the other case, but drawn and not deployed
        deployed, drawn = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0.001, 0.999, 0.001])
    learner.policy_net.features.fc.bias.data.copy_(deployed)
    learner.begin_epoch(0 if held else 1)
    images = NORMALISATION(train_split.images)
    noise = drawn.expand(len(images), 3)
    found = learner.step(Batch(images=images, labels=train_split.labels, noise=noise))
    actions = torch.tensor([True, False, True]).expand(len(images), 3)
    logits = other.train()(images, actions)
    losses = torch.nn.functional.cross_entropy(logits, train_split.labels, reduction="none")
    kept = [p for name, p in other.named_parameters() if not name.startswith("blocks.1.")]
    gradients = [p.grad for p in one.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, list(torch.autograd.grad(losses.mean(), kept)))
    assert all(p.grad is None for p in learner.policy_net.parameters())
    assert found["blocks"] == 2
    right = (
        logits.argmax(dim=1) == train_split.labels if estimator == "self_critical" else (-losses).exp()
    )
    reward = right.float() * (1 - (2 / 3) ** 2) - (1 - right.float()) * 2.0
    torch.testing.assert_close(found["reward"], reward.mean().detach())


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
def test_a_policy_that_drops_every_block_goes_on(estimator, train_split, small_resnet):
    learner = policy_learner(small_resnet, finetune=True, estimator=estimator, alpha=1.0)
    torch.nn.init.constant_(learner.policy_net.features.fc.bias, -50.0)
    learner.begin_epoch(0)
    noise = torch.full((len(train_split), 3), 0.5)
    images = NORMALISATION(train_split.images)
    found = learner.step(Batch(images=images, labels=train_split.labels, noise=noise))
    assert found["blocks"] == 0
    assert all(torch.isfinite(value) for value in found.values())


def test_a_teacher_stays_as_it_was(small_resnet, train_split):
    images = NORMALISATION(train_split.images)
    batch = Batch(images=images, labels=train_split.labels, noise=torch.empty(len(images), 0))
    loss = Distillation(small_resnet, share=1.0, normalisation=NORMALISATION, precision="fp32")
    logits = small_resnet.eval()(images).detach()
    before = loss(logits, batch)
    torch.testing.assert_close(before, torch.zeros(len(images)), atol=1e-5, rtol=0)
    with torch.no_grad():
        for weight in small_resnet.parameters():
            weight.mul_(0.5)
    torch.testing.assert_close(loss(logits, batch), before, atol=0, rtol=0)
    assert loss(small_resnet(images).detach(), batch).mean() > 1e-3


def test_targets_are_softened_by_the_share_of_the_teacher():
    labels, logits = torch.tensor([1]), torch.tensor([[0.0, 0.0]])
    assert soft_targets(labels, logits, 0.0).tolist() == [[0.0, 1.0]]
    assert soft_targets(labels, logits, 0.5).tolist() == [[0.25, 0.75]]


class PartBlock(torch.nn.Module):
    """So much of the way from what comes out without a block to what comes out with it."""

    def __init__(self, block: torch.nn.Module, share: torch.Tensor) -> None:
        super().__init__()
        self.block, self.share = block, share

    def forward(self, x):
        without = self.block.shortcut(x)
        return without + self.share[:, None, None, None] * (self.block(x) - without)


@pytest.mark.parametrize("try_dropped", [False, True])
def test_gates_tell_the_slope_of_the_loss_in_the_share_of_a_block(
    small_resnet, train_split, try_dropped
):
    """Against finite differences."""
    small_resnet.double().eval()
    images = NORMALISATION(train_split.images[:4]).double()
    actions = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]).bool()
    gates = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    logits = small_resnet(images, actions, gates, try_dropped=try_dropped)
    torch.testing.assert_close(logits, small_resnet(images, actions))
    logits[:, 0].sum().backward()
    step = 1e-6
    for number in range(small_resnet.num_blocks):
        ends = []
        for change in (-step, step):
            parts = [PartBlock(b, actions[:, k].double()) for k, b in enumerate(small_resnet.blocks)]
            parts[number].share += change
            x = small_resnet.stem(images)
            for part in parts:
                x = part(x)
            ends.append(small_resnet.head(x)[:, 0].detach())
        slope = (ends[1] - ends[0]) / (2 * step)
        assert (slope != 0).all()
        expected = slope if try_dropped else slope * actions[:, number]
        torch.testing.assert_close(gates.grad[:, number], expected, rtol=1e-3, atol=1e-6)


def test_trying_a_dropped_block_moves_no_statistic_and_no_weight(train_split):
    torch.manual_seed(0)
    one, other = (cifar_resnet(depth=8, width=4, num_classes=3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    images = NORMALISATION(train_split.images)
    actions = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0)) < 0.5
    actions[:, 1] = False  # nobody runs it
    gates = torch.ones(len(images), 3, requires_grad=True)
    one(images, actions, gates, try_dropped=True).square().sum().backward()
    other(images, actions).square().sum().backward()
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == name.startswith("blocks.1.")
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)
    for found, expected in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(found, expected)
    assert (gates.grad != 0).all()


def test_a_high_penalty_keeps_more_blocks_than_none(train_split, validation_split):
    """A network that is right only with its blocks: without a penalty they are not worth it."""
    kept = {}
    for gamma in (0.0, 20.0):
        torch.manual_seed(0)
        resnet = cifar_resnet(depth=8, width=4, num_classes=3)
        run(classifier(resnet), train_split, validation_split, epochs=8)
        learner = policy_learner(resnet, finetune=False, epochs_per_block=0.01, gamma=gamma)
        results = run(learner, train_split, validation_split, epochs=25)
        kept[gamma] = results[-1].validation["blocks_mean"]
    assert kept[20.0] > kept[0.0]


def test_the_greedy_pass_moves_no_batch_statistics(small_resnet, train_split):
    learner = policy_learner(small_resnet, finetune=True)
    learner.begin_epoch(0)
    tracked = small_resnet.bn1.num_batches_tracked.clone()
    images = NORMALISATION(train_split.images)
    noise = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))
    learner.step(Batch(images=images, labels=train_split.labels, noise=noise))
    assert small_resnet.bn1.num_batches_tracked == tracked + 1  # the sampled pass alone


def test_means_weigh_every_image_equally():
    class Counter:
        """Reports its batch's mean label, so that the epoch's mean must be the split's."""

        noise_columns = 0
        normalisation = NORMALISATION
        optimizer = make_optimizer("sgd", [{"params": [torch.zeros(1)], "lr": 1.0}], weight_decay=0)

        def begin_epoch(self, epoch): ...

        def step(self, batch):
            return {"label": batch.labels.float().mean()}

        def validate(self, split):
            return {}

    split = make_split(37)
    (result,) = run(Counter(), split, split, epochs=1)
    assert result.train["label"] == pytest.approx(float(split.labels.float().mean()))


def test_batches_differ_by_one_image_at_most_and_cover_all():
    parts = batches(torch.randperm(37), 16)
    assert sorted(len(p) for p in parts) == [12, 12, 13]
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(37))


def test_schedules_at_their_ends():
    assert constant(0.7) == 1
    assert cosine(0.0) == 1
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1.0) == pytest.approx(0)
    assert cosine(0.05, warmup=0.1) == pytest.approx(0.5)
    assert cosine(0.1, warmup=0.1) == 1
    assert warmed_up(0.05, warmup=0.1, schedule=constant) == pytest.approx(0.5)
    assert warmed_up(0.1, warmup=0.1, schedule=constant) == 1
    assert warmed_up(0.0, warmup=0.0, schedule=constant) == 1
    assert step_down(0.79, at=0.8) == 1
    assert step_down(0.8, at=0.8) == pytest.approx(0.1)


def test_the_schedule_sets_every_groups_rate(small_resnet, train_split, validation_split):
    learner = classifier(small_resnet, lr=0.1)
    run(learner, train_split, validation_split, epochs=2)
    last_step = (1 + 2 / 3) / 2  # the third of three steps of the second of two epochs
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * cosine(last_step))


def test_augmentation_shifts_and_mirrors_as_drawn():
    image = torch.arange(3 * 3 * 3, dtype=torch.uint8).view(1, 3, 3, 3)
    shift = Augmentation(crop_padding=1, flip=True)
    same_place = shift(image, torch.tensor([[1, 1, 0]]))
    assert torch.equal(same_place, image)
    down = shift(image, torch.tensor([[0, 1, 0]]))
    assert torch.equal(down[0, 1:], image[0, :2])
    assert not down[0, 0].any()
    mirrored = shift(image, torch.tensor([[1, 1, 1]]))
    assert torch.equal(mirrored, image.flip(2))


def test_augmentation_draws_every_offset_and_mirrors_half():
    drawn = Augmentation(crop_padding=2, flip=True).draw(4000, generator(0))
    assert set(drawn[:, 0].tolist()) == set(range(5)) == set(drawn[:, 1].tolist())
    assert drawn[:, 2].double().mean() == pytest.approx(0.5, abs=0.05)
    assert not Augmentation(crop_padding=2, flip=False).draw(100, generator(0))[:, 2].any()


def test_normalisation_is_that_of_its_definition():
    images = torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8)
    found = NORMALISATION(images)
    expected = ((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_random_tables_depend_on_the_key_alone():
    torch.manual_seed(5)
    first = torch.rand(4, generator=generator(0, "finetune", 3))
    torch.manual_seed(6)
    assert torch.equal(first, torch.rand(4, generator=generator(0, "finetune", 3)))
    for other in ((1, "finetune", 3), (0, "curriculum", 3), (0, "finetune", 4)):
        assert not torch.equal(first, torch.rand(4, generator=generator(*other)))


@pytest.mark.parametrize(("family", "size"), [("imagenet", 32), ("imagenet", 8), ("cifar", 8)])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_image_alone_trains_every_network(family, size, batch):
    """Where its last stages are one pixel too: the block learns, and its statistics stay."""
    depth = {"imagenet": 18, "cifar": 14}[family]
    torch.manual_seed(0)
    resnet = make_resnet(family=family, depth=depth, width=8, num_classes=3)
    policy_net = PolicyNet(num_blocks=resnet.num_blocks, depth=depth, width=8, family=family)
    split = make_split(batch, size=size)
    inputs = NORMALISATION(split.images)
    last = resnet.flat_blocks()[-1]
    before = {name: value.clone() for name, value in last.named_buffers()}
    actions = torch.ones(batch, resnet.num_blocks, dtype=torch.bool)
    actions[1:, -1] = False  # one image keeps it
    resnet.train()
    policy_net.train()
    (resnet(inputs, actions).sum() + policy_net(inputs).sum()).backward()
    gradients = [p.grad for network in (resnet, policy_net) for p in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert last.bn2.weight.grad.abs().sum() > 0
    one_pixel = family == "imagenet"
    same = [torch.equal(value, before[name]) for name, value in last.named_buffers()]
    assert all(same) if one_pixel else not any(same)


@pytest.mark.parametrize("estimator", ["self_critical", "straight_through", "reinmax"])
def test_finetuning_of_small_images_of_the_family_imagenet(estimator):
    torch.manual_seed(0)
    resnet = make_resnet(family="imagenet", depth=10, width=8, num_classes=3)
    policy_net = PolicyNet(num_blocks=4, depth=10, width=8, family="imagenet", initial_keep_prob=0.3)
    learner = PolicyLearner(
        resnet,
        policy_net,
        optimizer=make_optimizer(
            "adam",
            [{"params": [*resnet.parameters(), *policy_net.parameters()], "lr": 0.001}],
            weight_decay=0.0,
        ),
        rules=PolicyObjective(gamma=2.0, alpha=0.8, entropy_coef=0.1, estimator=estimator),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=Distillation(resnet, share=0.0, normalisation=NORMALISATION, precision="fp32"),
    )
    train = make_split(21, size=16)
    results = run(learner, train, make_split(6, size=16), epochs=2, batch_size=2)
    assert all(math.isfinite(value) for value in results[-1].train.values())
