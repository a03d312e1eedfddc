"""Images unlike the training's are told from those like them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import NORMALISATION, trained
from checkpoints import change_tensors, networks
from torch import Tensor

from pipeline.models import checkpoint
from pipeline.models.checkpoint import CheckpointError
from pipeline.models.out_of_distribution import FALSE_ALARMS, UsualImages, statistics_of
from pipeline.models.policy_net import PolicyNet
from pipeline.serving.predictor import Predictor
from tools import predict

SIZE = 16


def smooth(count: int, seed: int) -> Tensor:
    """Images of soft blobs [B, H, W, 3] uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    return F.interpolate(coarse, size=SIZE, mode="bilinear").round().to(torch.uint8).permute(0, 2, 3, 1)


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def plain(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    colours = torch.randint(0, 256, (count, 1, 1, 3), generator=generator, dtype=torch.uint8)
    return colours.expand(-1, SIZE, SIZE, -1).contiguous()


@pytest.fixture(scope="module")
def policy_net() -> PolicyNet:
    return trained(PolicyNet(num_blocks=3, depth=8, width=4), seed=0)


@pytest.fixture(scope="module")
def usual(policy_net) -> UsualImages:
    return UsualImages.of(policy_net, map(NORMALISATION, smooth(2000, seed=1).split(300)))


def share_unlike(usual: UsualImages, policy_net: PolicyNet, images: Tensor) -> float:
    return float(usual.are_unlike(policy_net, NORMALISATION(images)).float().mean())


def test_one_in_a_hundred_usual_images_is_called_unlike_and_noise_and_plain_ones_are(usual, policy_net):
    assert share_unlike(usual, policy_net, smooth(2000, seed=1)) == pytest.approx(
        FALSE_ALARMS, abs=0.002
    )
    assert share_unlike(usual, policy_net, smooth(2000, seed=2)) < 3 * FALSE_ALARMS
    assert share_unlike(usual, policy_net, noise(100)) == 1
    assert share_unlike(usual, policy_net, plain(100)) > 0.9


def test_statistics_are_mean_and_log_variance_of_what_enters_each_batch_norm(policy_net):
    images = NORMALISATION(smooth(3, seed=3))
    statistics = statistics_of(policy_net, images)
    entering = policy_net.features.conv1(images.contiguous(memory_format=torch.channels_last))
    pixels = entering.detach().double().flatten(2)  # [B, C, H*W]
    expected = torch.cat([pixels.mean(2), pixels.var(2, correction=0).add(1e-6).log()], dim=1)
    assert torch.allclose(statistics[0], expected, atol=1e-6)
    assert [part.shape[1] for part in statistics] == [8, 8, 8, 16, 16, 32, 32]  # two of each channel


def test_looking_leaves_the_network_as_it_was(policy_net):
    images = NORMALISATION(smooth(3, seed=3))
    before = {name: tensor.clone() for name, tensor in policy_net.state_dict().items()}
    statistics_of(policy_net.train(), images)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy_net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in policy_net.modules())


def test_a_checkpoint_keeps_what_is_usual(tmp_path):
    model = networks()
    batches = [NORMALISATION(smooth(100, seed=4))]
    model = replace(model, usual_images=UsualImages.of(model.policy_net, batches))
    checkpoint.save(model, tmp_path)
    images = torch.cat([smooth(20, seed=5), plain(20)])
    unlike = Predictor(checkpoint.load(tmp_path)).unlike_training(images)
    assert unlike.tolist() == Predictor(model).unlike_training(images.numpy()).tolist()
    assert unlike[:20].mean() < 0.5 < unlike[20:].mean()


def test_an_older_checkpoint_does_not_tell(tmp_path):
    checkpoint.save(networks(), tmp_path)
    assert Predictor(checkpoint.load(tmp_path)).unlike_training(noise(1)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("usual_images.limits"), "missing limits"),
        (lambda tensors: tensors.update({"usual_images.means": torch.zeros(3)}), r"means is .*\(3,\)"),
        (lambda tensors: tensors["usual_images.limits"].fill_(torch.nan), "NaN or infinite"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, change, message):
    model = networks()
    checkpoint.save(replace(model, usual_images=UsualImages(model.policy_net)), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_statistics_without_a_policy_network_are_refused(tmp_path):
    model = networks()
    stray = replace(model, policy_net=None, usual_images=UsualImages(model.policy_net))
    checkpoint.save(stray, tmp_path)
    with pytest.raises(CheckpointError, match=r"weights of no network of model\.json: usual_images"):
        checkpoint.load(tmp_path)


def test_predict_names_the_images_that_are_unlike(capsys):
    names = [f"{number}.png" for number in range(9)]
    predict.warn_of_unlike(names, torch.tensor([True, False] * 4 + [True]).numpy())
    assert capsys.readouterr().err == (
        "warning: unlike the images of the training, so that the class says little: "
        "0.png, 2.png, 4.png, 6.png, 8.png\n"
    )
    predict.warn_of_unlike(names, torch.ones(9, dtype=torch.bool).numpy())
    assert capsys.readouterr().err.endswith("3.png, 4.png and 4 more\n")
    predict.warn_of_unlike(names, None)
    predict.warn_of_unlike(names, torch.zeros(9, dtype=torch.bool).numpy())
    assert capsys.readouterr().err == ""
