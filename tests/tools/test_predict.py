"""The command that classifies files: what it prints, which images it reads, how it fails."""

import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import make_split, small_pair
from PIL import Image

from pipeline.models import checkpoint
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, Checkpoint
from pipeline.serving.predictor import Predictor
from tools import predict

SIZE = 8
CLASSES = ("cat", "[dog]", "hält")


@pytest.fixture(scope="module")
def networks() -> Checkpoint:
    return small_pair(classes=CLASSES, image_size=SIZE)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch, networks):
    """A folder with a trained model where the command looks for it."""
    checkpoint.save(networks, tmp_path / "models" / "finetune")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDROP_DEVICE", "cpu")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def images() -> np.ndarray:
    return make_split(4, size=SIZE).images.numpy()


@pytest.fixture
def files(images) -> list[str]:
    for number, image in enumerate(images):
        Image.fromarray(image).save(f"{number}.png")
    return [f"{number}.png" for number in range(len(images))]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; its exit status, or the words it ends with, and what it printed."""

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *words])
        status: object = 0
        try:
            predict.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_plain_lines_say_what_the_predictor_says(run, files, images, networks):
    status, output, complaints = run(*files)
    assert (status, complaints) == (0, "")
    header, *lines = output.splitlines()
    assert header.split() == ["image", "class", "confidence", "blocks", "kept", "FLOPs", "saved"]
    for line, file, prediction in zip(lines, files, Predictor(networks)(images), strict=True):
        strip = "".join("#" if is_kept else "." for is_kept in prediction.kept_blocks)
        assert line.split() == [
            file, prediction.name, f"{100 * prediction.confidence:.1f}", "%", strip,
            f"{prediction.blocks}/6", f"{prediction.flops:.3g}",
            f"{100 * prediction.flops_saved:.1f}", "%",
        ]  # fmt: skip


def test_columns_are_aligned(run, files):
    Path(files[0]).rename("a rather long name.png")
    lines = run("a rather long name.png", *files[1:])[1].splitlines()
    assert len({line.index("/6") for line in lines[1:]}) == 1


def test_json_is_one_object_a_line(run, files, images, networks):
    status, output, _ = run(files[0], "--json", *files[1:])  # options may stand between images
    assert status == 0
    records = [json.loads(line) for line in output.splitlines()]
    for record, file, prediction in zip(records, files, Predictor(networks)(images), strict=True):
        probabilities = dict(zip(CLASSES, prediction.probabilities.tolist(), strict=True))
        assert record == prediction.record() | {"image": file, "probabilities": probabilities}


def test_table_on_a_terminal_takes_no_name_for_markup(run, files, monkeypatch, networks):
    plain = run(*files)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    table = run(*files)[1]
    assert "\x1b[1m" in table
    assert [line.split() for line in table.splitlines()[1:]] == [
        line.split() for line in plain.splitlines()[1:]
    ]
    for name in {line.split()[1] for line in plain.splitlines()[1:]}:
        assert name in CLASSES


@pytest.mark.parametrize("name", ["", WEIGHTS, SIDECAR])
def test_model_is_named_by_its_folder_or_a_file_in_it(run, files, tmp_path, name):
    expected = run(*files)[1]
    (tmp_path / "models" / "finetune").rename(tmp_path / "mine")
    assert run("--model", str(tmp_path / "mine" / name), *files)[:2] == (0, expected)


def test_resnet_alone_runs_every_block(run, files, networks, tmp_path):
    checkpoint.save(replace(networks, policy_net=None), tmp_path / "models" / "pretrain")
    _, output, _ = run("--model", "models/pretrain", *files)
    assert all("######" in line and line.endswith(" 0.0 %") for line in output.splitlines()[1:])


# images of every kind


def grey(level: int, mode: str = "L") -> Image.Image:
    return Image.new(mode, (SIZE, SIZE), level)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", grey(128)),
        ("cmyk.tif", Image.new("CMYK", (SIZE, SIZE), (127, 127, 127, 0))),
        ("deep.png", Image.fromarray(np.full((SIZE, SIZE), 128 * 257, np.uint16))),
        ("alpha.png", Image.new("RGBA", (SIZE, SIZE), (128, 128, 128, 255))),
        ("palette.gif", Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).quantize()),
        ("large.webp", Image.new("RGB", (50, 30), (128, 128, 128))),
    ],
)
def test_images_of_every_kind_are_read_as_training_reads_them(run, name, image):
    image.save(name)
    Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).save("plain.png")
    records = [json.loads(line) for line in run("--json", name, "plain.png")[1].splitlines()]
    assert records[0].pop("image") == name
    assert records[1].pop("image") == "plain.png"
    assert records[0] == records[1]


def test_photo_is_turned_as_its_exif_says(run, images):
    photo = Image.fromarray(images[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save("lying.png", exif=exif)
    photo.transpose(Image.Transpose.ROTATE_270).save("upright.png")
    records = [json.loads(line) for line in run("--json", "lying.png", "upright.png")[1].splitlines()]
    assert records[0]["probabilities"] == records[1]["probabilities"]


# failures


def damage(name: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    Path(name).write_bytes(Path(name).read_bytes()[:200])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("missing.png", lambda name: None),
        ("damaged.png", damage),
        ("text.png", lambda name: Path(name).write_text("cat")),
        ("folder", lambda name: Path(name).mkdir()),
        ("pipe.png", os.mkfifo),  # which is not waited for
        ("float.tif", lambda name: Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(name)),
    ],
)
def test_unreadable_image_is_named_and_the_others_predicted(run, files, name, make):
    make(name)
    expected = run(*files)[1].splitlines()
    status, output, complaints = run(files[0], name, *files[1:])
    assert status == 1
    assert [line.split() for line in output.splitlines()] == [line.split() for line in expected]
    assert complaints.startswith(f"error: {name} can't be read as an image")
    assert complaints.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_name_that_is_no_utf8_is_printed_escaped(run, files, words, monkeypatch):
    name = os.fsdecode(b"\xff.png")
    Path(files[0]).rename(name)
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", strict)
    assert run(*words, name)[0] == 0
    strict.flush()
    assert b"\\udcff.png" in strict.buffer.getvalue()


def test_nothing_to_read_prints_no_table(run):
    assert run("a.png", "b.png")[:2] == (1, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model", "none"),
            "^error: none is no folder with a trained model.*`make repro`.*pretrained/finetune is one",
        ),
        (("--model", "data"), f"^error: data/{SIDECAR} can't be read"),
        (("--model", "models/damaged"), f"^error: models/damaged/{WEIGHTS} is damaged"),
        (("--model", "models/curriculum"), "models/curriculum holds no ResNet"),
        (("--image-size", "16"), "not 16; leave the size out"),
    ],
)
def test_model_that_can_not_predict_is_named(run, files, networks, words, message):
    Path("data").mkdir()
    checkpoint.save(replace(networks, resnet=None), Path("models/curriculum"))
    checkpoint.save(networks, Path("models/damaged"))
    Path("models/damaged", WEIGHTS).write_bytes(b"x")
    status, output, _ = run(*words, *files)
    assert output == ""
    assert re.search(message, str(status))


def test_older_checkpoint_asks_for_its_image_size(run, files, networks):
    expected = run(*files)[1]
    checkpoint.save(replace(networks, image_size=None), Path("models/finetune"))
    assert "`--image-size`" in str(run(*files)[0])
    assert run(*files, "--image-size", str(SIZE))[:2] == (0, expected)


def test_unknown_device_is_named(run, files, monkeypatch):
    monkeypatch.setenv("BLOCKDROP_DEVICE", "tpu")
    assert str(run(*files)[0]).startswith("error: BLOCKDROP_DEVICE='tpu'")


def test_name_that_the_registry_lacks_is_said(run, files, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a fresh store takes seconds
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    status = str(run("--model", "models:/blockdrop@champion", *files)[0])
    assert status.startswith("error: models:/blockdrop@champion is not in http://127.0.0.1:9")
