"""Averaged answers: the formula, and that the fit has the least cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.averaging import AveragedAnswers


def two_classifiers(scales=(2.0, 2.5)):
    """Labels [2000] and the logits of two classifiers that err independently, [2000, 3] each."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2000,), generator=draw)
    truth = F.one_hot(labels, 3).float()
    return labels, *(scale * truth + torch.randn(2000, 3, generator=draw) for scale in scales)


def test_it_weighs_log_probabilities_after_the_temperatures():
    _, own, resnet = two_classifiers()
    average = AveragedAnswers()
    average.temperature.fill_(2.0)
    average.resnet_temperature.fill_(4.0)
    average.own_share.fill_(0.25)
    expected = 0.25 * torch.log_softmax(own / 2, dim=1) + 0.75 * torch.log_softmax(resnet / 4, dim=1)
    assert torch.allclose(average(own, resnet), expected)
    assert torch.equal(average.log_probs(own), torch.log_softmax(own / 2, dim=1))


@pytest.mark.parametrize(("scales", "low", "high"), [((2.0, 2.5), 0.25, 0.5), ((2.5, 2.0), 0.5, 0.75)])
def test_the_better_classifier_weighs_more_and_the_loss_is_least(scales, low, high):
    labels, own, resnet = two_classifiers(scales)
    average = AveragedAnswers()
    average.fit(own, resnet[None], labels)
    share = float(average.own_share)
    assert low < share < high
    losses = {}
    for other in (0.0, share - 0.05, share, share + 0.05, 1.0):
        average.own_share.fill_(other)
        losses[other] = float(F.cross_entropy(average(own, resnet), labels))
    assert min(losses, key=losses.get) == share


def test_temperatures_follow_the_scale_of_the_logits():
    labels, own, resnet = two_classifiers()
    average, scaled = AveragedAnswers(), AveragedAnswers()
    average.fit(own, torch.stack([resnet, own]), labels)
    scaled.fit(3 * own, 2 * torch.stack([resnet, own]), labels)
    assert float(scaled.temperature) == pytest.approx(3 * float(average.temperature), rel=0.01)
    assert float(scaled.resnet_temperature) == pytest.approx(
        2 * float(average.resnet_temperature), rel=0.01
    )
