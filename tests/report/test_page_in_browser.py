"""The whole page, with real figures, in a real browser: wide and narrow, light and dark."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium
from made_results import TIMED

from pipeline.benchmark import figures
from pipeline.evaluation import learning_curves
from pipeline.plotting import plt, save
from pipeline.report import html, markdown
from pipeline.report.trade_off import trade_off

pytestmark = pytest.mark.slow

LEAST_CONTRAST = 4.5  # of text, by WCAG 2.1, level AA
# every element that has text of its own, with the contrast to what is behind it
CONTRASTS = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const parts = numbers(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const words = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim());
    if (!words.length) continue;
    const both = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
    found.push([(both[0] + 0.05) / (both[1] + 0.05), element.tagName, words[0].data.trim()]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def report(results, origin, tmp_path) -> Path:
    """A page with a table of every kind, links, and figures by the functions that stages call."""
    rows = [
        {"kind": kind, "depth": 110, "blocks": 54, "finetuned": 0, "flops": flops, "accuracy": accuracy}
        for kind, flops, accuracy in (("full", 1e8, 0.96), ("sole", 5.9e7, 0.9))
    ]
    ours = {"accuracy": 0.95, "flops": 6e7, "label": "BlockDrop, gamma 5"}
    trade_off(tmp_path / "trade_off.png", baselines=rows, blockdrop=[ours], title="T", images=1000)
    figures.speedups(tmp_path / "speedups.png", times=[replace(TIMED, ideal=1.8)], title="T")
    learning_curves.learning_curves(
        tmp_path / "learning_curves.png", curriculum=[], finetune=[], num_blocks=15
    )
    for name in ("policy", "policies_by_class", "easy_and_hard"):
        figure = plt.figure(figsize=(9, 3))
        if name == "easy_and_hard":
            figure.subplots().imshow([[0, 1]])
        save(figure, tmp_path / f"{name}.png")
    links = {"this experiment": "http://127.0.0.1:5050/#/experiments/1/runs/" + "0123456789abcdef" * 2}
    text = markdown.page(
        results, replace(origin, experiment="gamma-5", changed=["params.yaml"], links=links)
    )
    path = tmp_path / "report.html"
    path.write_text(html.page(text, tmp_path), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_page_can_be_read(report, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: line.type == "error" and faults.append(line.text))
    page.goto(report.as_uri(), timeout=240_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(pictures) == 6
    assert all(complete and wide > 0 and alt for complete, wide, alt in pictures)
    anchors = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(anchors) == page.locator("h2").count() == 6
    for anchor in anchors:
        assert page.locator(f"[id='{anchor.removeprefix('#')}']").count() == 1
    page.click("nav a:last-child >> nth=-1")
    page.wait_for_function("scrollY > 500")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert min(contrasts)[0] >= LEAST_CONTRAST, min(contrasts)
    # charts are inverted on a dark page, a figure with photographs stays on white; a narrow one
    # scrolls in its frame, where it can be read
    looks = page.evaluate(
        "[...document.querySelectorAll('.picture')].map(p => [p.classList.contains('chart'),"
        " getComputedStyle(p).backgroundColor, getComputedStyle(p.firstChild).filter.slice(0, 6)])"
    )
    assert sum(is_chart for is_chart, *_ in looks) == 5
    for is_chart, *look in looks:
        inverted = is_chart and scheme == "dark"
        assert look == (["rgba(0, 0, 0, 0)", "invert"] if inverted else ["rgb(255, 255, 255)", "none"])
    assert min(page.evaluate("[...document.images].map(i => i.clientWidth)")) >= 560
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert faults == []
    page.close()
