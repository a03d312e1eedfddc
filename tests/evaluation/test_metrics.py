"""The questions put to a policy, against networks whose answers are known."""

from dataclasses import replace

import pytest
import torch
from builders import NORMALISATION, make_split, pair_between_paths

from pipeline.data.split import Split
from pipeline.evaluation.metrics import (
    best_single_policy,
    difficulty_spearman,
    shuffled_accuracy,
    single_policy_candidates,
)
from pipeline.flops import Cost
from pipeline.inference.predict import correct_under, policy_outputs, predict, predict_policy
from pipeline.models.policy_net import PolicyNet

pytestmark = pytest.mark.usefixtures("stand_ins")

COST = Cost(always=15, policy_net=5, blocks=(100, 10, 1))


class Oracle(torch.nn.Module):
    """Predicts the class that its policy spells: block k alone means class k; else class 0."""

    def forward(self, images, actions=None):
        return actions.float() if actions is not None else torch.ones(len(images), 3)


def shuffled(resnet: torch.nn.Module, split: Split, actions: torch.Tensor, *, repeats: int) -> float:
    draw = torch.Generator().manual_seed(0)
    return shuffled_accuracy(
        resnet, split, actions, normalisation=NORMALISATION, repeats=repeats, draw=draw
    )


def test_policy_that_carries_the_answer_loses_it_by_shuffling():
    split = make_split(300)
    actions = torch.nn.functional.one_hot(split.labels, 3).bool()
    assert predict(Oracle(), split, actions, normalisation=NORMALISATION).accuracy == 1
    assert shuffled(Oracle(), split, actions, repeats=10) == pytest.approx(1 / 3, abs=0.05)


def test_shuffling_gives_every_image_another_images_policy():
    split = Split(images=torch.zeros(5, 8, 8, 3, dtype=torch.uint8), labels=torch.arange(5))
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, images, actions=None):
            seen.append(actions.int().argmax(dim=1))
            return torch.zeros(len(images), 5)

    shuffled(Recorder(), split, torch.eye(5).bool(), repeats=20)
    assert len(seen) == 20
    for row in seen:
        assert sorted(row.tolist()) == list(range(5))
        assert not (row == torch.arange(5)).any()


def test_one_policy_for_all_loses_nothing_by_shuffling(small_resnet, validation_split):
    actions = torch.tensor([True, False, True]).expand(len(validation_split), -1)
    accuracy = predict(small_resnet, validation_split, actions, normalisation=NORMALISATION).accuracy
    assert shuffled(small_resnet, validation_split, actions, repeats=2) == accuracy


def test_single_policies_stay_within_the_budget():
    actions = torch.tensor([[1, 0, 0]] * 3 + [[0, 1, 1]] * 2 + [[1, 1, 1]]).bool()
    found = single_policy_candidates(actions, COST, budget=110, limit=10)
    assert found[0].tolist() == [True, False, False]  # the most frequent first: 10 + 100 FLOPs
    assert found[1].tolist() == [False, True, True]
    assert (COST.without_policy_net().of(found) <= 110).all()
    assert len(torch.unique(found, dim=0)) == len(found)
    assert [False, False, False] in found.tolist()  # none kept is always affordable


def test_a_policy_network_that_answers_is_a_single_policy_at_its_own_cost():
    cost = replace(COST, answers=True)
    actions = torch.tensor([[0, 0, 0]] * 3 + [[0, 1, 1]]).bool()
    found = single_policy_candidates(actions, cost, budget=cost.policy_net, limit=10)
    assert found.tolist() == [[False] * 3]
    pair = pair_between_paths(make_split(200).images)
    policy, accuracy = best_single_policy(
        pair["resnet"],
        make_split(200),
        found,
        normalisation=NORMALISATION,
        policy_net=pair["policy_net"],
    )
    own = policy_outputs(pair["policy_net"], make_split(200), normalisation=NORMALISATION).argmax(dim=1)
    assert policy.tolist() == [False] * 3
    assert accuracy == float((own == make_split(200).labels).double().mean())


def test_single_policies_are_limited_in_number():
    actions = torch.tensor([[1, 0, 0]] * 3 + [[0, 1, 1]] * 2 + [[0, 0, 1]]).bool()
    found = single_policy_candidates(actions, COST, budget=1e9, limit=1).tolist()
    assert found[0] == [True, False, False]
    assert [False, True, True] not in found


def test_the_best_single_policy_is_the_most_often_right_one():
    split = Split(images=torch.zeros(4, 8, 8, 3, dtype=torch.uint8), labels=torch.tensor([2, 2, 2, 1]))
    policy, accuracy = best_single_policy(
        Oracle(), split, torch.eye(3).bool(), normalisation=NORMALISATION
    )
    assert policy.tolist() == [False, False, True]
    assert accuracy == 0.75


def test_correct_under_several_policies_is_that_under_each(monkeypatch, small_resnet):
    monkeypatch.setattr("pipeline.inference.predict.EVALUATION_BATCH", 7)
    split = make_split(24, seed=1)
    policies = torch.rand(4, 24, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    found = correct_under(small_resnet, split, policies, normalisation=NORMALISATION)
    alone = [predict(small_resnet, split, a, normalisation=NORMALISATION).correct for a in policies]
    assert torch.equal(found, torch.stack(alone))
    assert 0 < found.double().mean() < 1


def test_effort_that_follows_difficulty_correlates():
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0))
    value, low, high = difficulty_spearman(losses, losses.argsort().argsort(), resamples=200, seed=0)
    assert value == pytest.approx(1)
    unrelated = torch.randint(5, (200,), generator=torch.Generator().manual_seed(1))
    value, low, high = difficulty_spearman(losses, unrelated, resamples=200, seed=0)
    assert low < value < high
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.3)
    same = torch.full((200,), 4)  # of which no correlation is claimed
    assert difficulty_spearman(losses, same, resamples=100, seed=0) == (None,) * 3


def test_predictions_do_not_depend_on_how_images_are_batched(small_resnet, monkeypatch):
    split = make_split(23)
    actions = torch.rand(23, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    policy_net = PolicyNet(num_blocks=3, width=4)
    whole = predict(small_resnet, split, actions, normalisation=NORMALISATION)
    policy = predict_policy(policy_net, split, normalisation=NORMALISATION)
    monkeypatch.setattr("pipeline.inference.predict.EVALUATION_BATCH", 5)
    parts = predict(small_resnet, split, actions, normalisation=NORMALISATION)
    assert torch.equal(whole.classes, parts.classes)
    torch.testing.assert_close(whole.losses, parts.losses)
    torch.testing.assert_close(policy, predict_policy(policy_net, split, normalisation=NORMALISATION))


def test_spearman_has_an_interval_where_resamples_have_none():
    losses, blocks = torch.tensor([0.0, 0, 0, 0, 0, 1]), torch.tensor([3, 4, 5, 3, 4, 5])
    value, low, high = difficulty_spearman(losses, blocks, resamples=200, seed=0)
    assert low <= value <= high
