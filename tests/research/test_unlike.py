"""The table of how well unlike images are told."""

import sys
from dataclasses import replace

import numpy as np
from builders import make_split, small_pair

from pipeline.models import checkpoint
from pipeline.models.out_of_distribution import UsualImages
from research import unlike

SIZE = 16


def test_every_kind_of_image_has_a_row(tmp_path, monkeypatch, capsys):
    split = make_split(30, size=SIZE)
    monkeypatch.setattr(unlike, "load_split", lambda *_: split)
    monkeypatch.setattr(unlike, "COUNT", 20)
    model = small_pair(classes=("a", "b", "c"), image_size=SIZE)
    usual_images = UsualImages.of(model.policy_net, [model.normalisation(split.images)])
    checkpoint.save(replace(model, usual_images=usual_images), tmp_path)
    monkeypatch.setattr(sys, "argv", ["unlike", str(tmp_path)])
    unlike.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    told = {name.strip(): (int(n), share.strip()) for name, n, share, _ in rows}
    assert told["test images"][0] == 30
    assert told["plain colours"][0] == 20
    assert float(told["plain colours"][1].removesuffix(" %")) > 50
    assert len(told) == 7


def test_images_of_other_kinds_are_what_they_are_called(monkeypatch):
    split = make_split(30, size=SIZE)
    monkeypatch.setattr(unlike, "load_split", lambda *_: split)
    sets = unlike.image_sets(None, SIZE)
    assert all(images.shape[1:] == (SIZE, SIZE, 3) for images in sets.values())
    assert all(images.dtype == np.uint8 for images in sets.values())
    assert np.ptp(sets["plain colours"], axis=(1, 2)).max() == 0
    assert (sets["digits"] == sets["digits"][..., :1]).all()
    assert (sets["test images, negatives"] == 255 - sets["test images"]).all()
    assert len({crop.tobytes() for crop in sets["photo crops"]}) == unlike.COUNT
