"""The page of `dvc plots` by .dvc/plots.html: pictures fit the window, and charts need no network."""

import configparser
from pathlib import Path

import pytest
from browsers import chromium
from dvc_render import ImageRenderer, VegaRenderer, render_html
from PIL import Image

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / ".dvc/plots.html"
REVISIONS = ("main", "gamma-5")
CURVE = [{"epoch": f"{epoch}", "accuracy": f"{0.1 * epoch}", "rev": rev}
         for rev in REVISIONS for epoch in (1, 2, 3)]  # fmt: skip
BARS = [{"block": f"{block}", "kept": "0.5", "rev": rev} for rev in REVISIONS for block in (1, 2)]


@pytest.fixture
def page(tmp_path) -> Path:
    """A curve, bars, a scatter and a picture wider than a screen, of two revisions."""
    Image.new("RGB", (3000, 300), "red").save(tmp_path / "wide.png")
    wide = [{"rev": rev, "src": str(tmp_path / "wide.png")} for rev in REVISIONS]
    renderers = [
        VegaRenderer(CURVE, "curve", x="epoch", y="accuracy", revs_with_datapoints=REVISIONS),
        VegaRenderer(BARS, "bars", x="kept", y="block", template="bar_horizontal"),
        VegaRenderer(CURVE, "points", x="epoch", y="accuracy", template="scatter"),
        ImageRenderer(wide, "wide.png"),
    ]
    return Path(render_html(renderers, tmp_path / "page/index.html", html_template=TEMPLATE))


def test_dvc_finds_the_template():
    config = configparser.ConfigParser()
    config.read_string((ROOT / ".dvc/config").read_text().replace("    ", ""))
    assert ROOT / ".dvc" / config["plots"]["html_template"] == TEMPLATE


def test_scripts_from_a_network_are_loaded_after_the_charts(page):
    """A browser waits for them, which takes minutes where a firewall drops what it asks."""
    text = page.read_text()
    last_chart = text.rindex("vegaEmbed('#points'")
    assert text.index("function vegaEmbed") < last_chart < text.index('src="https://')
    assert "{" + "plot_divs" not in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [800, 1600])
def test_page_is_readable_in_a_browser_without_a_network(page, width):
    with chromium() as browser:
        shown = browser.new_context(offline=True, viewport={"width": width, "height": 900}).new_page()
        faults: list[str] = []
        shown.on("pageerror", lambda error: faults.append(str(error)))
        shown.goto(page.as_uri())
        values = [shown.locator(f"#{name} circle").count() for name in ("curve", "bars", "points")]
        assert values == [6, 4, 6]
        assert shown.locator("#curve polyline").count() == 2  # a line for each revision
        assert "gamma-5: epoch 3, accuracy 0.3" in (shown.text_content("#curve") or "")
        right = "[...document.images].map(image => image.getBoundingClientRect().right)"
        edges = shown.evaluate(right)
        assert edges[0] < edges[1] <= width  # side by side
        assert faults == []
