"""A policy network that answers itself: every executor gives the same answers, and runs no more."""

import pytest
import torch
from builders import NORMALISATION, make_split, pair_between_paths

from pipeline.flops import measure
from pipeline.inference.auto import EXECUTORS, make_executor
from pipeline.inference.base import Networks, UnavailableError
from pipeline.inference.native import Native

IMAGES = make_split(40).images


def networks_of(paths=("000", "100", "111")) -> Networks:
    return Networks(normalisation=NORMALISATION, **pair_between_paths(IMAGES, paths))


def by_hand(networks: Networks, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions and logits, image by image, by the networks as they were trained."""
    values = networks.policy_net.path_values
    logits, actions = [], []
    with torch.no_grad():
        for image in NORMALISATION(images).split(1):
            class_logits = networks.policy_net.eval().features(image)
            kept = values(class_logits) >= 0
            answer = values.average.log_probs(class_logits)
            if kept.any() or not values.answers:
                resnet_logits = networks.resnet.eval()(image, kept)
                answer = values.average(class_logits, resnet_logits)
            logits.append(answer)
            actions.append(kept)
    return torch.cat(actions), torch.cat(logits)


@pytest.mark.parametrize("paths", [("000", "100", "111"), ("100", "111")])
@pytest.mark.parametrize("name", ["auto", *EXECUTORS])
def test_every_executor_answers_as_by_hand(name, paths):
    networks = networks_of(paths)
    try:
        execute = make_executor(networks, name=name)
    except UnavailableError as error:
        pytest.skip(str(error))
    actions, logits = by_hand(networks, IMAGES)
    assert len(actions.unique(dim=0)) > 1
    output = execute(IMAGES)
    assert torch.equal(output.actions, actions)
    assert torch.allclose(output.logits, logits, atol=1e-4)
    assert torch.allclose(execute.classify(NORMALISATION(IMAGES), actions), logits, atol=1e-4)
    alone = torch.cat([execute(image).logits for image in IMAGES[:5].split(1)])
    assert torch.allclose(alone, logits[:5], atol=1e-4)


@pytest.mark.parametrize("method", ["__init__", "_run"])
def test_auto_goes_on_with_the_next_executor_that_can(monkeypatch, capsys, method):
    """Without a compiler, or where the first executor fails in its first batch."""

    def fail(*args, **kwargs):
        raise UnavailableError("no C++ compiler")

    monkeypatch.setattr(Native, method, fail)
    networks = networks_of()
    execute = make_executor(networks)
    actions, logits = by_hand(networks, IMAGES)
    output = execute(IMAGES)
    assert torch.equal(output.actions, actions)
    assert torch.allclose(output.logits, logits, atol=1e-4)
    assert [executor.name for executor in execute.candidates] == ["gather or grouped"]
    assert [kind.name for kind in execute.fallbacks] == ["masked"]
    assert set(execute.left_out) == {"native"}


@pytest.mark.parametrize("name", ["native", "gather"])
def test_gamma_is_that_of_the_moment(name):
    networks = networks_of()
    try:
        execute = make_executor(networks, name=name)
    except UnavailableError as error:
        pytest.skip(str(error))
    blocks = []
    for gamma in (0.0, 1000.0, 1e9):
        networks.policy_net.path_values.gamma.fill_(gamma)
        output = execute(IMAGES)
        assert torch.equal(output.actions, by_hand(networks, IMAGES)[0])
        blocks.append(int(output.actions.sum()))
    assert blocks == sorted(blocks)
    assert blocks[0] < blocks[-1]


def test_the_resnet_runs_on_the_images_that_keep_a_block_alone():
    execute = make_executor(networks_of(), name="gather")
    seen = []
    run = execute.resnet._run
    execute.resnet._run = lambda images, actions: seen.append(len(images)) or run(images, actions)
    actions = execute(IMAGES).actions
    assert seen == [int(actions.any(dim=1).sum())]
    execute(IMAGES, torch.zeros(40, 3, dtype=torch.bool))
    assert len(seen) == 1


@pytest.mark.parametrize("paths", [("000", "111"), ("100", "111")])
def test_several_policies_at_once_are_as_one_after_the_other(paths):
    """Also where no block is kept by a policy network that never answers."""
    networks = networks_of(paths)
    execute, reference = make_executor(networks), make_executor(networks, name="masked")
    policies = torch.rand(3, 40, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    policies[0, :10] = False
    together = execute(IMAGES, policies).logits
    for policy, logits in zip(policies, together, strict=True):
        assert torch.allclose(execute(IMAGES, policy).logits, logits, atol=1e-5)
        assert torch.allclose(reference(IMAGES, policy).logits, logits, atol=1e-4)


def test_an_image_without_blocks_costs_the_policy_network_alone():
    networks = networks_of()
    cost = measure(networks.resnet, networks.policy_net, 8)
    actions = torch.tensor([[False] * 3, [True, False, False]])
    expected = [cost.policy_net, cost.always + cost.blocks[0]]
    assert cost.of(actions).tolist() == expected
    never = networks_of(("100", "111"))
    cost = measure(never.resnet, never.policy_net, 8)
    assert cost.of(actions[:1]).tolist() == [cost.always]


def test_empty_batch():
    output = make_executor(networks_of())(IMAGES[:0])
    assert output.logits.shape == (0, 3)
    assert output.actions.shape == (0, 3)
