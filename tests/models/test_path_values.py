"""Decisions by value: the path with the largest expected reward, as keep logits and as an answer."""

import pytest
import torch
from torch import Tensor

from pipeline.models.path_values import PathValues, statistics_of

PATHS = ("0000", "1010", "1011")


def class_logits(images: int = 50) -> Tensor:
    return torch.randn(images, 3, generator=torch.Generator().manual_seed(0)) * 2


def values_of(paths=PATHS) -> PathValues:
    values = PathValues(paths, num_classes=3)
    # the less sure of an image, the better the later paths
    slopes = torch.linspace(2, -2, len(paths))
    values.weight[:, 0] = slopes
    values.bias.copy_(-slopes * statistics_of(values.average.log_probs(class_logits()))[:, 0].median())
    values.costs.copy_(torch.tensor([path.count("1") / 4 for path in paths]))
    values.gamma.fill_(2.0)
    return values


def test_rewards_are_eq_3_in_expectation():
    values, logits = values_of(), class_logits()
    correct = values.correct_prob(logits)
    for path, cost in enumerate(values.costs):
        expected = correct[:, path] * (1 - cost**2) - (1 - correct[:, path]) * 2.0
        assert torch.allclose(values.rewards(logits)[:, path], expected)


@pytest.mark.parametrize("paths", [PATHS, ("1000", "1111"), ("0011", "1100")])
def test_keep_logits_are_positive_exactly_on_the_best_path(paths):
    values, logits = values_of(paths), class_logits()
    best = values.rewards(logits).argmax(dim=1)
    assert len(best.unique()) > 1
    assert torch.equal(values(logits) >= 0, values.mask[best])
    assert values(logits).isfinite().all()


def test_only_a_path_without_blocks_lets_the_policy_network_answer():
    assert values_of().answers
    assert not values_of(("1000", "1111")).answers


def test_statistics_are_the_log_odds_the_lead_the_entropy_and_the_class():
    statistics = statistics_of(torch.tensor([[0.5, 0.25, 0.25]]).log())
    assert statistics[0].tolist() == pytest.approx([0.0, 0.6931, 1.0397, 1, 0, 0], abs=1e-4)
    assert statistics_of(torch.tensor([[0.0, -torch.inf, -torch.inf]]).clamp_min(-100)).isfinite().all()


def test_dial_gives_the_gamma_of_a_budget_and_names_its_range():
    values = values_of()
    values.dial.copy_(torch.stack([torch.logspace(-1, 1, 64), torch.linspace(100, 200, 64)]))
    assert values.gamma_of(100) == pytest.approx(0.1)
    assert values.gamma_of(150) == pytest.approx(1.0, rel=0.05)
    with pytest.raises(ValueError, match="from 100 to 200"):
        values.gamma_of(201)
