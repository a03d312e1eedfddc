"""Exported networks by ONNX Runtime, beside the reference executor."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import NORMALISATION, make_split, pair_between_paths, small_pair, trained

from pipeline.flops import measure
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint, CheckpointError
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet
from pipeline.models.resnet_imagenet import imagenet_resnet
from pipeline.onnx_graph import NoOnnxError
from pipeline.serving.onnx_export import MANIFEST, RUNNER, export

SIZE = 16
CLASSES = ("cat", "dog", "hält")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_split(20, size=SIZE).images


def checkpoints(images: torch.Tensor) -> dict[str, Checkpoint]:
    """Every kind of model that can be exported."""
    gates = small_pair(classes=CLASSES, image_size=SIZE)
    imagenet = trained(imagenet_resnet(depth=18, width=4, num_classes=3), seed=1)
    widths = (8, 8, 16, 8, 16, 8)
    pruned = cifar_resnet(depth=14, width=16, num_classes=3, inner_channels=tuple((n,) for n in widths))
    return {
        "gates": gates,
        "gates at half size": replace(
            gates, policy_net=trained(PolicyNet(num_blocks=6, depth=8, width=4, input_size=8), seed=2)
        ),
        "paths, answers": replace(gates, **pair_between_paths(images)),
        "paths": replace(gates, **pair_between_paths(images, paths=("100", "111"))),
        "no policy": replace(gates, policy_net=None),
        "imagenet": replace(
            gates, resnet=imagenet, policy_net=trained(PolicyNet(num_blocks=8, depth=8, width=4), seed=3)
        ),
        "pruned": replace(gates, resnet=trained(pruned, seed=4)),
    }


def load_runner(folder: Path):
    """The runner module that lies in an exported folder."""
    spec = importlib.util.spec_from_file_location("exported_runner", folder / RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", list(checkpoints(make_split(2, size=SIZE).images)))
def test_parts_and_whole_give_what_the_reference_gives(name, images, tmp_path):
    import onnxruntime

    model = checkpoints(images)[name]
    expected = make_executor(
        Networks(resnet=model.resnet, policy_net=model.policy_net, normalisation=NORMALISATION),
        name="masked",
    )(images)
    if model.policy_net is not None:  # else the rest of this test proves little
        assert len(expected.actions.unique(dim=0)) > 1
    export(model, tmp_path / "export")
    run = load_runner(tmp_path / "export").BlockDrop(tmp_path / "export", threads=1)
    whole = onnxruntime.InferenceSession(tmp_path / "export/masked.onnx")
    numbers = {} if run.manifest["gamma"] is None else {"gamma": np.float32(run.manifest["gamma"])}
    numbers = {key: np.asarray(value) for key, value in numbers.items()}
    for rows in (slice(0, 20), slice(3, 4), slice(5, 5 + 7)):
        batch = images[rows].numpy()
        for logits, actions in (run(batch), whole.run(None, {"images": batch} | numbers)):
            assert np.array_equal(actions, expected.actions[rows].numpy())
            np.testing.assert_allclose(logits, expected.logits[rows].numpy(), atol=1e-4)
    cost = measure(model.resnet, model.policy_net, SIZE)
    assert run.manifest["flops"]["blocks"] == list(cost.blocks)
    assert run.manifest["classes"] == list(CLASSES)


@pytest.mark.slow
def test_a_gamma_decides_in_the_exported_graph(images, tmp_path):
    model = checkpoints(images)["paths, answers"]
    export(model, tmp_path / "export")
    run = load_runner(tmp_path / "export").BlockDrop(tmp_path / "export", threads=1)
    blocks = [int(run(images.numpy(), gamma)[1].sum()) for gamma in (0.0, None, 1e9)]
    assert blocks == sorted(blocks)
    assert blocks[0] < blocks[2]


@pytest.mark.slow
def test_the_runner_is_a_program_that_imports_no_torch(images, tmp_path):
    from PIL import Image

    model = checkpoints(images)["gates"]
    export(model, tmp_path / "export")
    Image.fromarray(images[0].numpy()).resize((40, 40), Image.Resampling.NEAREST).save(
        tmp_path / "a.png"
    )
    blocked = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path(sys.argv.pop(1), "
    blocked += "run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "export/runner.py", "a.png"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    name, label, blocks = done.stdout.split()
    assert name == "a.png"
    assert label in CLASSES
    assert len(blocks) == 6


@pytest.mark.slow
def test_the_command_writes_a_folder_once(images, tmp_path):
    checkpoint.save(checkpoints(images)["gates"], tmp_path / "model")
    leftover = tmp_path / "export.unfinished"  # of an export that was killed
    leftover.mkdir()
    (leftover / "old.onnx").touch()
    command = [sys.executable, "-m", "tools.export", str(tmp_path / "model")]
    command += ["--to", str(tmp_path / "export")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"export: {tmp_path / 'export'}, ")
    assert not leftover.exists()
    written = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert {MANIFEST, RUNNER, "masked.onnx", "block_005.onnx"} <= set(written)
    assert "old.onnx" not in written
    assert json.loads((tmp_path / "export" / MANIFEST).read_text())["shortcuts"] == [2, 4]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert "exists already; remove it, or name another" in second.stderr
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == written


def test_what_cannot_be_exported_leaves_nothing(images, tmp_path, monkeypatch):
    model = checkpoints(images)["gates"]
    with pytest.raises(CheckpointError, match="holds no ResNet"):
        export(replace(model, resnet=None), tmp_path / "export")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    with pytest.raises(UserError, match="exists already"):
        export(model, tmp_path / "taken")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NoOnnxError, match="onnx is not installed; `make peers` installs it"):
        export(model, tmp_path / "export")
    shutil.rmtree(tmp_path / "taken")
    assert list(tmp_path.iterdir()) == []
