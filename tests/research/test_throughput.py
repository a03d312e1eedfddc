"""The throughput of training: the plain loop computes what ours does, and every loop is timed."""

import pytest
import torch
from PIL import Image

from pipeline.infra.errors import UserError
from pipeline.models.resnet import ResNet
from research import throughput


def test_the_plain_loop_computes_what_ours_does(small_resnet: ResNet):
    small_resnet.eval()
    images = torch.rand(5, 3, 8, 8)
    actions = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
    logits = throughput.masked(small_resnet, images, actions)
    torch.testing.assert_close(logits, small_resnet(images, actions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", throughput.STAGES)
def test_throughput_times_every_loop_of_a_stage(stage):
    options = throughput.Options(
        stages=[stage], images=32, batch_size=16, rounds=1, workers=[0], depth=8, keep_ratio=0.5
    )
    rates = throughput.measure(options, torch.device("cpu"))
    num_ours = 1 if stage == "pretrain" else 2
    assert [rate.loop.split(",")[0] for rate in rates] == ["plain"] + ["ours"] * num_ours
    assert all(rate.images_per_second > 0 for rate in rates)
    assert rates[0].times_the_best_plain == 1.0


def test_throughput_of_decoding_is_that_of_a_folders_images(tmp_path):
    for number in range(2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.jpg")
    (row,) = throughput.decoding(tmp_path, rounds=2, images=4, size=16)
    assert row["images_per_second"] > 0
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds no images \(.jpg, .jpeg, .png\); name a folder"):
        throughput.decoding(tmp_path / "none", rounds=1, images=1)
