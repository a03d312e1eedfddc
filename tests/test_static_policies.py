"""Static rules: how many blocks and which, and that a ResNet learns with those alone."""

import math

import pytest
import torch
from builders import NORMALISATION, trained

from pipeline.architectures import CIFAR_STAGES
from pipeline.device import generator
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.static_policies import RULES, static_rule
from pipeline.training.classification import Classification
from pipeline.training.loop import Batch
from pipeline.training.optim import make_optimizer


def noise_of(count: int, blocks: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, blocks, generator=generator(seed))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("blocks", [3, 15, 54])
def test_every_image_keeps_as_many_blocks_as_asked_for(name, blocks):
    noise = noise_of(20, blocks)
    for kept in range(blocks + 1):
        actions = static_rule(name, kept)(noise)
        assert actions.dtype == torch.bool
        assert actions.shape == noise.shape
        assert (actions.sum(dim=1) == kept).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("training", [False, True])
def test_with_all_blocks_kept_it_is_the_full_network_bit_for_bit(name, training):
    resnet = trained(cifar_resnet(depth=14, width=4, num_classes=3), seed=0).train(training)
    images = torch.randn(6, 3, 8, 8, generator=generator(1))
    actions = static_rule(name, resnet.num_blocks)(noise_of(6, resnet.num_blocks))
    assert torch.equal(resnet(images, actions), resnet(images))


def test_first_is_a_prefix():
    assert static_rule("first", 2)(noise_of(2, 6)).tolist() == [[True, True, *4 * [False]]] * 2


@pytest.mark.parametrize("blocks", [3, 15, 54])
def test_distribute_differs_by_one_block_between_stages_and_the_earliest_have_it(blocks):
    for kept in range(blocks + 1):
        stages = static_rule("distribute", kept)(noise_of(1, blocks))[0].view(CIFAR_STAGES, -1)
        whole, over = divmod(kept, CIFAR_STAGES)
        assert stages.sum(dim=1).tolist() == [whole + (stage < over) for stage in range(CIFAR_STAGES)]
        assert torch.equal(stages, stages.sort(dim=1, descending=True).values)  # a stage's first blocks


@pytest.mark.parametrize("name", RULES)
def test_one_more_block_leaves_the_others_in(name):
    noise = noise_of(50, 15)
    for kept in range(15):
        fewer, more = (static_rule(name, k)(noise) for k in (kept, kept + 1))
        assert (fewer <= more).all()


@pytest.mark.parametrize("name", ["first", "distribute"])
def test_fixed_rules_do_not_look_at_the_image(name):
    one, other = (static_rule(name, 7)(noise_of(30, 15, seed)) for seed in (0, 1))
    assert torch.equal(one, other)
    assert len(one.unique(dim=0)) == 1


def test_random_keeps_the_blocks_of_the_smallest_noise():
    noise = noise_of(100, 15)
    smallest = noise.topk(7, dim=1, largest=False).indices
    expected = torch.zeros(100, 15, dtype=torch.bool).scatter_(1, smallest, True)
    assert torch.equal(static_rule("random", 7)(noise), expected)


def test_random_draws_every_set_of_blocks_equally_often():
    """20,000 images and the C(6, 2) = 15 sets: each count is binomial, within four deviations."""
    images, share = 20_000, 1 / math.comb(6, 2)
    actions = static_rule("random", 2)(noise_of(images, 6))
    _, counts = actions.unique(dim=0, return_counts=True)
    assert len(counts) == 15
    bound = 4 * math.sqrt(images * share * (1 - share))
    assert all(abs(count - images * share) < bound for count in counts.tolist())


def test_a_rows_draw_depends_on_that_row_alone():
    rule, noise = static_rule("random", 4), noise_of(10, 15)
    alone = torch.cat([rule(row) for row in noise.split(1)])
    assert torch.equal(alone, rule(noise))


def test_unknown_rule_names_those_there_are():
    with pytest.raises(ValueError, match="'last'; choose one of first, random, distribute"):
        static_rule("last", 3)


def learner_of(resnet: ResNet, name: str | None, kept: int = 0, weight_decay: float = 0.1):
    return Classification(
        resnet,
        optimizer=make_optimizer(
            "adam", [{"params": list(resnet.parameters()), "lr": 0.01}], weight_decay=weight_decay
        ),
        normalisation=NORMALISATION,
        precision="fp32",
        rule=None if name is None else static_rule(name, kept),
    )


def batch_of(split, blocks: int) -> Batch:
    noise = noise_of(len(split), blocks)
    return Batch(images=NORMALISATION(split.images), labels=split.labels, noise=noise)


def step(learner: Classification, batch: Batch, rate: float = 0.01):
    learner.optimizer.param_groups[0]["lr"] = rate  # `fit` sets it by the schedule
    return learner.step(batch)


@pytest.mark.parametrize("name", ["first", "distribute"])
def test_a_step_touches_no_block_that_is_dropped_and_all_that_are_kept(name, train_split):
    """Not by weight decay and not by batch statistics either."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=14, width=4, num_classes=3)
    learner = learner_of(resnet, name, 3)
    before = [{k: v.clone() for k, v in block.state_dict().items()} for block in resnet.flat_blocks()]
    for _ in range(3):
        step(learner, batch_of(train_split, 6))
    kept = static_rule(name, 3)(noise_of(1, 6))[0].tolist()
    for block, old, runs in zip(resnet.flat_blocks(), before, kept, strict=True):
        same = [torch.equal(value, old[key]) for key, value in block.state_dict().items()]
        assert not any(same) if runs else all(same)
        assert all((p.grad is not None) == runs for p in block.parameters())
    assert resnet.fc.weight.grad.any()


def test_the_gradient_is_that_of_the_paths_that_ran(train_split):
    """Under RandomK a block's gradient comes from the images that keep it and from no others."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=8, width=4, num_classes=3).eval()  # batch norm would tie images together
    batch = batch_of(train_split, 3)
    actions = static_rule("random", 1)(batch.noise)
    weight = resnet.flat_blocks()[1].conv2.weight
    losses = torch.nn.functional.cross_entropy(
        resnet(batch.images, actions), batch.labels, reduction="none"
    )
    dropped, kept = losses[~actions[:, 1]].sum(), losses[actions[:, 1]].sum()
    (of_dropped,) = torch.autograd.grad(dropped, weight, retain_graph=True)
    (of_kept,) = torch.autograd.grad(kept, weight, retain_graph=True)
    (of_all,) = torch.autograd.grad(losses.sum(), weight)
    assert not of_dropped.any()
    torch.testing.assert_close(of_kept, of_all)


@pytest.mark.parametrize("name", RULES)
def test_keeping_every_block_trains_as_pretraining_does_bit_for_bit(name, train_split, validation_split):
    found = []
    for rule in (None, name):
        torch.manual_seed(0)
        resnet = cifar_resnet(depth=8, width=4, num_classes=3)
        learner = learner_of(resnet, rule, 3)
        metrics = [step(learner, batch_of(train_split, 3)) for _ in range(2)]
        found.append((metrics, resnet.state_dict(), learner.validate(validation_split)))
    (metrics, weights, validation), other = found[0], found[1]
    assert [{k: float(v) for k, v in row.items()} for row in metrics] == [
        {k: float(v) for k, v in row.items()} for row in other[0]
    ]
    assert all(torch.equal(value, other[1][key]) for key, value in weights.items())
    assert validation == other[2]


def test_only_a_learner_with_a_rule_draws_noise(small_resnet):
    assert learner_of(small_resnet, None).noise_columns == 0
    assert learner_of(small_resnet, "first", 1).noise_columns == 3


def test_validation_runs_the_rule_and_draws_the_same_each_time(validation_split):
    resnet = trained(cifar_resnet(depth=14, width=4, num_classes=3), seed=0)
    learner, drawn = learner_of(resnet, "random", 2), []
    rule = learner.rule

    def watched(noise):
        drawn.append(rule(noise))
        return drawn[-1]

    learner.rule = watched
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(learner.validate(validation_split))
    assert found[0] == found[1]
    assert torch.equal(drawn[0], drawn[1])
    with torch.no_grad():
        logits = resnet.eval()(NORMALISATION(validation_split.images), drawn[0])
    right = logits.argmax(dim=1) == validation_split.labels
    assert found[0]["accuracy"] == float(right.double().mean())
    loss = torch.nn.functional.cross_entropy(logits, validation_split.labels)
    assert found[0]["loss"] == pytest.approx(float(loss), abs=1e-5)
