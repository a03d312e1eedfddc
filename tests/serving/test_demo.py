"""The demo page: its server, and the page in a real browser."""

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsers import chromium
from builders import make_split, pair_between_paths, small_pair
from PIL import Image

from pipeline.infra.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.out_of_distribution import UsualImages
from pipeline.serving import demo as module
from pipeline.serving.demo import Demo, make_server

SIZE = 16
CLASSES = ("cat", "dog", "hält")
BUDGETS = (0.31, 0.89)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_split(20, size=SIZE).images


@pytest.fixture(scope="module")
def between_paths(images) -> Checkpoint:
    model = replace(small_pair(classes=CLASSES, image_size=SIZE), **pair_between_paths(images))
    values = model.policy_net.path_values
    flops = (
        torch.linspace(0.3, 0.9, values.dial.shape[1]) * Demo(model, Path("none")).predictor.cost.full
    )
    values.dial.copy_(torch.stack([1e6 * torch.linspace(0, 1, len(flops)) ** 20, flops]))
    usual_images = UsualImages.of(model.policy_net, [model.normalisation(images)])
    return replace(model, usual_images=usual_images)


@pytest.fixture(scope="module")
def blocks_of(between_paths, images) -> list[list[int]]:
    """Blocks of every image under a low and a high budget."""
    predict = Demo(between_paths, Path("none")).predictor
    return [[p.blocks for p in predict(images, gamma=predict.gamma_of(budget=b))] for b in BUDGETS]


@pytest.fixture(scope="module")
def sample(blocks_of) -> int:
    """An image that the budget moves."""
    return next(n for n, (low, high) in enumerate(zip(*blocks_of, strict=True)) if low < high)


@pytest.fixture(scope="module")
def address(between_paths, images, sample, tmp_path_factory) -> Iterator[str]:
    samples = tmp_path_factory.mktemp("samples")
    for number, name in ((sample, "a"), (0, "b")):
        Image.fromarray(images[number].numpy()).save(samples / f"{name}.png")
    with make_server(Demo(between_paths, samples), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(url: str, content: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=content), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return file.getvalue()


def test_an_image_is_classified_as_the_predictor_does_it(address, between_paths, images):
    demo = Demo(between_paths, Path("none"))
    for number in range(6):
        status, content = ask(f"{address}/predict", png(images[number]))
        answer = json.loads(content)
        (expected,) = demo.predictor(images[number : number + 1])
        assert status == 200
        assert answer["class"] == expected.name
        assert answer["kept"] == expected.kept_blocks.tolist()
        assert answer["flops"] == expected.flops
        assert answer["full_flops"] == demo.predictor.cost.full
        assert answer["top"][0][1] == pytest.approx(expected.confidence)
        assert answer["milliseconds"] > 0
        assert answer["full_milliseconds"] > 0


def test_a_budget_moves_the_blocks(address, images, sample, blocks_of):
    for budget, blocks in zip(BUDGETS, blocks_of, strict=True):
        answer = json.loads(ask(f"{address}/predict?budget={budget}", png(images[sample]))[1])
        assert sum(answer["kept"]) == blocks[sample]


def test_an_image_unlike_those_of_the_training_is_named_so(address, between_paths, images):
    for pixels, unlike in ((images[0], False), (torch.full_like(images[0], 200), True)):
        assert json.loads(ask(f"{address}/predict", png(pixels))[1])["unlike"] is unlike


def test_the_page_its_model_and_its_samples(address, images, sample):
    status, page = ask(f"{address}/")
    assert status == 200
    assert b"http" not in page.replace(b"<!doctype html>", b"")  # nothing comes from elsewhere
    model = json.loads(ask(f"{address}/model")[1])
    assert model["classes"] == list(CLASSES)
    assert model["samples"] == ["a.png", "b.png"]
    assert model["budgets"] == pytest.approx([0.3, 0.9])
    assert ask(f"{address}/samples/a.png") == (200, png(images[sample]))


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("predict", b"no image", 400, "the file can't be read as an image"),
        ("predict?budget=0.95", None, 400, "budget 0.95 is out of this model's reach"),
        ("predict?budget=x", None, 400, "could not convert string to float"),
        ("elsewhere", b"", 404, "there is no /elsewhere"),
        ("samples/../params.yaml", None, 404, "there is no /samples/"),
    ],
)
def test_what_is_wrong_is_said(address, images, path, content, status, message):
    if content is None and path.startswith("predict"):
        content = png(images[0])
    got, answer = ask(f"{address}/{path}", content)
    assert got == status
    assert message in json.loads(answer)["error"]


def test_a_large_file_is_not_read(address, monkeypatch, images):
    monkeypatch.setattr(module, "LARGEST", 10)
    status, answer = ask(f"{address}/predict", png(images[0])[:50])
    assert status == 413
    assert "up to 10 bytes" in json.loads(answer)["error"]


def test_a_model_without_a_policy_network_is_refused():
    model = replace(small_pair(classes=CLASSES, image_size=SIZE), policy_net=None)
    with pytest.raises(UserError, match="has no policy network"):
        Demo(model, Path("none"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_works_in_a_browser(address, width, tmp_path, images, sample, blocks_of):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: line.type == "error" and faults.append(line.text))
        page.goto(address)
        page.wait_for_selector("#result:not([hidden])")  # the first sample is taken
        assert page.locator("#blocks b").count() == 3
        first = page.inner_text("#class")
        assert first in CLASSES
        assert page.locator("#samples button[aria-pressed=true]").count() == 1
        for budget, blocks in zip(BUDGETS, blocks_of, strict=True):
            page.fill("#budget", str(budget))
            count = f"document.querySelectorAll('#blocks b.kept').length == {blocks[sample]}"
            page.wait_for_function(count)
        assert page.inner_text("#count") == f"{blocks_of[1][sample]} of 3 blocks ran"
        assert not page.is_visible("#unlike")
        (tmp_path / "photo.png").write_bytes(png(images[3].repeat(3, 4, 1)))  # of another size
        page.set_input_files("#file", tmp_path / "photo.png")
        page.wait_for_function("document.querySelector('#samples [aria-pressed=true]') === null")
        page.wait_for_selector("#picture:not([hidden])")
        Image.new("RGB", (SIZE, SIZE), "white").save(tmp_path / "white.png")
        page.set_input_files("#file", tmp_path / "white.png")
        page.wait_for_selector("#unlike:not([hidden])")
        assert "unlike those that the network was trained on" in page.inner_text("#unlike")
        (tmp_path / "text.png").write_text("no image")
        page.set_input_files("#file", tmp_path / "text.png")
        page.wait_for_selector("#error:not([hidden])")
        assert "can't be read as an image" in page.inner_text("#error")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []
