"""A page that needs nothing else."""

import base64
import re
from html import escape
from urllib.parse import unquote

import pytest

from pipeline.report import html

MARKDOWN = """# A < B

Some *text* with <script>alert(1)</script> in it.

| network | accuracy |
|---|---|
| full | 92.33 % |

![a picture](one.png)
"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg">\n<path d="M 0 0 %" fill="#123"/></svg>'


def test_page_holds_its_pictures_and_fetches_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        html.page(MARKDOWN, tmp_path)
    (tmp_path / "one.png").write_bytes(b"\x89PNG one")
    page = html.page(MARKDOWN, tmp_path)
    assert base64.b64encode(b"\x89PNG one").decode() in page
    assert 'src="one.png"' not in page
    assert "http" not in page.replace("http-equiv", "")
    # text stays text, and the title is the heading
    assert "<title>A &lt; B</title>" in page
    assert "<script>" not in page
    assert "<em>text</em>" in page
    assert "<td>92.33 %</td>" in page


def test_page_takes_the_svg_beside_a_png(tmp_path):
    (tmp_path / "one.png").write_bytes(b"\x89PNG one")
    (tmp_path / "one.svg").write_text(SVG)
    page = html.page(MARKDOWN, tmp_path)
    (address,) = re.findall(
        r'<img src="data:image/svg\+xml;charset=utf-8,([^"]*)" alt="a picture"', page
    )
    assert unquote(address) == SVG.replace("\n", " ")
    assert "PNG" not in page


@pytest.mark.parametrize(
    ("svg", "kind"),
    [
        (SVG, "picture chart"),
        ('<svg><image href="data:image/png;base64,"/></svg>', "picture"),
        (None, "picture"),
    ],
)
def test_charts_alone_follow_a_dark_page(tmp_path, svg, kind):
    """A photograph with its brightness inverted would be wrong."""
    (tmp_path / "one.png").write_bytes(b"\x89PNG one")
    if svg:
        (tmp_path / "one.svg").write_text(svg)
    assert re.findall('<p class="(.*?)"', html.page(MARKDOWN, tmp_path)) == [kind]


def test_contents_lead_to_the_headings_by_githubs_names(tmp_path):
    text = "# A\n\nIntroduction.\n\n## When, `x` & why?\n\n```\n## no heading\n```\n\n## B-side\n"
    page = html.page(text, tmp_path)
    assert re.findall(r'<a href="#(.*?)">(.*?)</a>', page) == [
        ("when-x--why", "When, `x` &amp; why?"), ("b-side", "B-side")
    ]  # fmt: skip
    assert re.findall(r'<h2 id="(.*?)">', page) == ["when-x--why", "b-side"]
    assert page.index("Introduction.") < page.index("<nav") < page.index("<h2")
    assert "<nav" not in html.page("# A\n\nAlone.\n", tmp_path)


def test_columns_of_words_are_told_from_those_of_numbers(tmp_path):
    table = "| a | b |\n|---|---|\n| 1 | this cell is a whole sentence |\n| 2 | |\n"
    page = html.page(f"{table}\n| c | d |\n|---|---|\n| 3 | 4 |\n", tmp_path)
    assert page.count('class="words"') == 3
    for cell in ('<th class="words">b</th>', "<td>2</td>", "<th>d</th>"):
        assert cell in page


@pytest.mark.parametrize("text", ["a`b``c", "*a* _b_ <b> [c](d) | # ~~e~~ &amp; !", "\\", "`", "it's"])
def test_text_is_shown_as_it_is(text):
    render = html.MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render
    shown = escape(text, quote=False)
    for markdown in (html.as_markdown(text), html.as_code(text)):
        assert shown in render(f"x {markdown} y").replace("&quot;", '"')
    fence = html.fence_of(text)
    assert render(f"{fence}\n{text}\n{fence}\n") == f"<pre><code>{shown}\n</code></pre>\n"
    assert f"<td>{shown}</td>" in render(f"| a |\n|---|\n| {html.as_markdown(text)} |\n")
