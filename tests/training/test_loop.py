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
from pipeline.policy.learner import PolicyLearner
from pipeline.policy.objectives import PolicyObjective
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
    groups = [{"params": list(resnet.parameters()), "lr": lr}]
    return Classification(
        resnet,
        optimizer=make_optimizer("sgd", groups, weight_decay=0.0),
        normalisation=NORMALISATION,
        precision="fp32",
    )


def policy_learner(
    resnet: ResNet,
    *,
    finetune: bool,
    policy_net: PolicyNet | None = None,
    teacher_weight: float = 0.0,
    **objective: float | str | None,
) -> PolicyLearner:
    torch.manual_seed(1)
    policy_net = policy_net or PolicyNet(num_blocks=resnet.num_blocks, width=4)
    groups = [{"params": list(policy_net.parameters()), "lr": 0.01}]
    optimizer = make_optimizer("adam", groups, weight_decay=0.0)
    distillation = None
    if finetune:
        groups = [{"params": list(resnet.parameters()), "lr": 0.01}]
        optimizer = ChainedOptimizer(optimizer, make_optimizer("adam", groups, weight_decay=0.0))
        distillation = Distillation(
            resnet, teacher_weight=teacher_weight, normalisation=NORMALISATION, precision="fp32"
        )
    common = {"gamma": 2.0, "alpha": 0.8, "entropy_coef": 0.01, "num_flips": 2}
    return PolicyLearner(
        resnet,
        policy_net,
        optimizer=optimizer,
        objective=PolicyObjective(**common | objective),
        normalisation=NORMALISATION,
        precision="fp32",
        distillation=distillation,
    )


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


def one_step(learner: PolicyLearner, split: Split, noise: torch.Tensor | None = None) -> dict:
    """A step on a whole split, by drawn noise where none is given."""
    if noise is None:
        noise = torch.rand(len(split), 3, generator=torch.Generator().manual_seed(0))
    return learner.step(Batch(images=NORMALISATION(split.images), labels=split.labels, noise=noise))


def weights(*modules) -> list[torch.Tensor]:
    return [t.clone() for module in modules for t in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def twins() -> tuple[ResNet, ResNet]:
    torch.manual_seed(0)
    one, other = (cifar_resnet(depth=8, width=4, num_classes=3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    return one, other.train()


def test_a_classifier_learns(small_resnet, train_split, validation_split):
    results = run(classifier(small_resnet), train_split, validation_split, epochs=8)
    assert results[-1].validation["accuracy"] > 0.9
    assert results[-1].train["loss"] < results[0].train["loss"] / 2


@pytest.mark.parametrize(
    ("finetune", "estimator", "steps"),  # an epoch has three steps: at its end, and in the middle
    [
        (False, "self_critical", 5),
        (False, "local_expectation", 6),
        (True, "self_critical", 7),
        (True, "straight_through", 1),
        (True, "reinmax", 5),
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
            resnet, finetune=finetune, epochs_per_block=1, estimator=estimator, teacher_weight=0.5,
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


def spoil(learner: Classification, number: int, value: float) -> Classification:
    """The learner, whose loss is that value in its `number`-th step."""
    real, count = learner.step, itertools.count(1)

    def step(batch):
        metrics = real(batch)
        return metrics | {"loss": torch.tensor(value)} if next(count) == number else metrics

    learner.step = step
    return learner


@pytest.mark.parametrize(("step", "value"), [(1, float("nan")), (2, float("inf")), (3, -float("inf"))])
def test_the_first_step_that_is_not_finite_is_named(step, value, small_resnet, train_split):
    learner = spoil(classifier(small_resnet), 3 + step, value)
    position = Position()
    first, second = run(learner, train_split, train_split, epochs=2, position=position)
    require_finite(learner, position, first)
    with pytest.raises(NotFiniteError, match=f"loss is not finite from step {step} of epoch 2 on"):
        require_finite(learner, position, second)


def test_a_step_that_is_not_finite_is_named_before_the_epochs_end(small_resnet, train_split):
    learner = spoil(classifier(small_resnet), 2, float("nan"))
    position = Position()
    run(learner, train_split, train_split, epochs=1, position=position, steps=1)
    require_finite(learner, position)
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


def test_the_curriculum_gives_no_gradient_to_kept_blocks(small_resnet, train_split):
    learner = policy_learner(small_resnet, finetune=False, epochs_per_block=1)
    learner.begin_epoch(0)  # K = 3: only the last block is learnt
    one_step(learner, train_split)
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


@pytest.mark.parametrize("estimator", ["self_critical", "straight_through", "reinmax"])
def test_the_resnet_learns_from_the_labels_as_without_a_policy(estimator, train_split):
    """The gates' gradients and the reward's reach the policy alone."""
    one, other = twins()
    learner = policy_learner(one, finetune=True, estimator=estimator)
    torch.nn.init.constant_(learner.policy_net.features.fc.bias, 50.0)  # alpha 0.8: 80 % are kept
    learner.begin_epoch(0)
    one_step(learner, train_split)
    found = [p.grad for p in one.parameters() if p.grad is not None]
    noise = torch.rand(len(train_split), 3, generator=torch.Generator().manual_seed(0))
    images = NORMALISATION(train_split.images)
    loss = torch.nn.functional.cross_entropy(other(images, noise < 0.8), train_split.labels)
    torch.testing.assert_close(found, list(torch.autograd.grad(loss, list(other.parameters()))))


def parameters(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
def test_the_policy_is_held_then_learns_then_is_fixed(
    estimator, train_split, validation_split, small_resnet
):
    pace = {"frozen_epochs": 2, "train_epochs": 1, "entropy_epochs": 1}
    learner = policy_learner(small_resnet, finetune=True, estimator=estimator, **pace)
    position, policy, resnet = Position(), [parameters(learner.policy_net)], []
    rows, entropy_weights, statistics = [], [], []
    for epochs in (1, 2, 3, 4, 5):
        rows += run(learner, train_split, validation_split, epochs=epochs, position=position)
        policy.append(parameters(learner.policy_net))
        statistics.append([buffer.clone() for buffer in learner.policy_net.buffers()])
        resnet.append(weights(learner.resnet))
        entropy_weights.append(learner.entropy_coef)
    moved = [not same(one, other) for one, other in itertools.pairwise(policy)]
    assert moved == [False, False, True, False, False]
    assert not same(statistics[0], statistics[1])  # held, it decides by each batch, as when it learns
    assert same(statistics[2], statistics[4])
    assert not any(same(one, other) for one, other in itertools.pairwise(resnet))
    assert all(row.train.keys() == rows[2].train.keys() for row in rows)
    assert rows[0].train["policy_loss"] == rows[4].train["policy_loss"] == 0
    assert rows[2].train["policy_loss"] != 0
    assert entropy_weights == [0.01, 0.01, 0.01, 0, 0]


def test_a_frozen_resnet_takes_no_held_policy(small_resnet):
    with pytest.raises(ValueError, match="nothing would learn"):
        policy_learner(small_resnet, finetune=False, frozen_epochs=1)


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "fixed"])
def test_beside_a_waiting_policy_the_resnet_learns_on_the_paths(estimator, held, train_split):
    """On those sampled from a policy that is held, on those deployed once it is fixed."""
    one, other = twins()
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
    found = one_step(learner, train_split, drawn.expand(len(images), 3))
    actions = torch.tensor([True, False, True]).expand(len(images), 3)
    logits = other(images, actions)
    losses = torch.nn.functional.cross_entropy(logits, train_split.labels, reduction="none")
    kept = [p for name, p in other.named_parameters() if not name.startswith("blocks.1.")]
    gradients = [p.grad for p in one.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, list(torch.autograd.grad(losses.mean(), kept)))
    assert all(p.grad is None for p in learner.policy_net.parameters())
    assert found["blocks"] == 2
    correct = (
        logits.argmax(dim=1) == train_split.labels if estimator == "self_critical" else (-losses).exp()
    )
    reward = correct.float() * (1 - (2 / 3) ** 2) - (1 - correct.float()) * 2.0
    torch.testing.assert_close(found["reward"], reward.mean().detach())


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
def test_a_policy_that_drops_every_block_goes_on(estimator, train_split, small_resnet):
    learner = policy_learner(small_resnet, finetune=True, estimator=estimator, alpha=1.0)
    torch.nn.init.constant_(learner.policy_net.features.fc.bias, -50.0)
    learner.begin_epoch(0)
    found = one_step(learner, train_split, torch.full((len(train_split), 3), 0.5))
    assert found["blocks"] == 0
    assert all(torch.isfinite(value) for value in found.values())


def test_a_teacher_stays_as_it_was(small_resnet, train_split):
    images = NORMALISATION(train_split.images)
    batch = Batch(images=images, labels=train_split.labels, noise=torch.empty(len(images), 0))
    loss = Distillation(small_resnet, teacher_weight=1.0, normalisation=NORMALISATION, precision="fp32")
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


def test_a_high_penalty_keeps_more_blocks_than_none(train_split, validation_split):
    """A network that is correct only with its blocks: without a penalty they are not worth it."""
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
    one_step(learner, train_split)
    assert small_resnet.bn1.num_batches_tracked == tracked + 1  # the sampled pass alone


def test_means_weigh_every_image_equally(small_resnet):
    learner, split = classifier(small_resnet), make_split(37)
    learner.step = lambda batch: {"label": batch.labels.float().mean()}
    (result,) = run(learner, split, split, epochs=1)
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


@pytest.mark.parametrize(
    ("family", "size", "batch"),
    [("imagenet", 32, 1), ("imagenet", 8, 2), ("cifar", 8, 1), ("cifar", 8, 2)],
)
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


@pytest.mark.parametrize("estimator", ["self_critical", "reinmax"])
def test_finetuning_of_small_images_of_the_family_imagenet(estimator):
    torch.manual_seed(0)
    resnet = make_resnet(family="imagenet", depth=10, width=8, num_classes=3)
    policy_net = PolicyNet(num_blocks=4, depth=10, width=8, family="imagenet", initial_keep_prob=0.3)
    learner = policy_learner(resnet, finetune=True, policy_net=policy_net, estimator=estimator)
    train = make_split(21, size=16)
    results = run(learner, train, make_split(6, size=16), epochs=2, batch_size=2)
    assert all(math.isfinite(value) for value in results[-1].train.values())
