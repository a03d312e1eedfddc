"""Static rules: how many blocks and which, and that a ResNet learns with those alone."""

import pytest
import torch
from builders import NORMALISATION, trained

from pipeline.architectures import IMAGENET
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
def test_each_image_keeps_as_many_as_asked_for(name):
    noise = noise_of(20, 15)
    fewer = torch.zeros(20, 15, dtype=torch.bool)
    for num_kept in range(16):
        actions = static_rule(name, num_kept)(noise)
        assert actions.dtype == torch.bool
        assert actions.shape == noise.shape
        assert (actions.sum(dim=1) == num_kept).all()
        assert (fewer <= actions).all()
        fewer = actions


def test_first_is_a_prefix():
    assert static_rule("first", 2)(noise_of(2, 6)).tolist() == [[True, True, *4 * [False]]] * 2


@pytest.mark.parametrize(("stages", "sizes"), [(None, (5, 5, 5)), (IMAGENET[101], IMAGENET[101])])
def test_distribute_gives_each_stage_its_first_blocks_in_turn(stages, sizes):
    kept = [0] * len(sizes)
    for num_kept in range(sum(sizes)):
        actions = static_rule("distribute", num_kept, stages)(noise_of(2, sum(sizes)))
        assert torch.equal(actions[0], actions[1])
        expected = [block < kept[stage] for stage, size in enumerate(sizes) for block in range(size)]
        assert actions[0].tolist() == expected
        kept[min((s for s in range(len(sizes)) if kept[s] < sizes[s]), key=kept.__getitem__)] += 1


def test_random_keeps_the_blocks_of_an_images_smallest_noise():
    noise = noise_of(100, 15)
    smallest = noise.topk(7, dim=1, largest=False).indices
    expected = torch.zeros(100, 15, dtype=torch.bool).scatter_(1, smallest, True)
    assert torch.equal(static_rule("random", 7)(noise), expected)


def test_unknown_rule_names_those_there_are():
    with pytest.raises(ValueError, match="'last'; choose one of first, random, distribute"):
        static_rule("last", 3)


def learner_of(resnet: ResNet, name: str | None, num_kept: int = 0) -> Classification:
    groups = [{"params": list(resnet.parameters()), "lr": 0.01}]
    return Classification(
        resnet,
        optimizer=make_optimizer("adam", groups, weight_decay=0.1),
        normalisation=NORMALISATION,
        precision="fp32",
        rule=None if name is None else static_rule(name, num_kept),
    )


def batch_of(split, blocks: int) -> Batch:
    noise = noise_of(len(split), blocks)
    return Batch(images=NORMALISATION(split.images), labels=split.labels, noise=noise)


def test_a_step_touches_the_blocks_that_are_kept_and_no_other(train_split):
    """Not by weight decay and not by batch statistics either."""
    torch.manual_seed(0)
    resnet = cifar_resnet(depth=14, width=4, num_classes=3)
    learner = learner_of(resnet, "distribute", 3)
    before = [{k: v.clone() for k, v in block.state_dict().items()} for block in resnet.flat_blocks()]
    for _ in range(3):
        learner.step(batch_of(train_split, 6))
    kept = static_rule("distribute", 3)(noise_of(1, 6))[0].tolist()
    for block, old, runs in zip(resnet.flat_blocks(), before, kept, strict=True):
        same = [torch.equal(value, old[key]) for key, value in block.state_dict().items()]
        assert not any(same) if runs else all(same)
        assert all((p.grad is not None) == runs for p in block.parameters())
    assert resnet.fc.weight.grad.any()


def test_keeping_every_block_trains_as_pretraining_does(train_split, validation_split):
    trainings = []
    for rule in (None, "random"):
        torch.manual_seed(0)
        resnet = cifar_resnet(depth=8, width=4, num_classes=3)
        learner = learner_of(resnet, rule, 3)
        metrics = [learner.step(batch_of(train_split, 3)) for _ in range(2)]
        trainings.append((metrics, resnet.state_dict(), learner.validate(validation_split)))
    torch.testing.assert_close(*trainings, rtol=0, atol=0)


def test_only_a_learner_with_a_rule_draws_noise(small_resnet):
    assert learner_of(small_resnet, None).noise_columns == 0
    assert learner_of(small_resnet, "first", 1).noise_columns == 3


def test_validation_runs_the_rule_and_draws_the_same_each_time(validation_split):
    resnet = trained(cifar_resnet(depth=14, width=4, num_classes=3), seed=0)
    learner, drawn = learner_of(resnet, "random", 2), []
    rule = learner.rule
    learner.rule = lambda noise: drawn.append(rule(noise)) or drawn[-1]
    validations = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        validations.append(learner.validate(validation_split))
    assert validations[0] == validations[1]
    assert torch.equal(drawn[0], drawn[1])
    with torch.no_grad():
        logits = resnet.eval()(NORMALISATION(validation_split.images), drawn[0])
    correct = logits.argmax(dim=1) == validation_split.labels
    assert validations[0]["accuracy"] == float(correct.double().mean())
    loss = torch.nn.functional.cross_entropy(logits, validation_split.labels)
    assert validations[0]["loss"] == pytest.approx(float(loss), abs=1e-5)
