"""A page that needs nothing else."""

import base64
from html import escape

import pytest

from pipeline.report import html

MARKDOWN = """# A < B

Some *text* with <script>alert(1)</script> in it.

| network | accuracy |
|---|---|
| full | 92.33 % |

![a picture](one.png)
"""


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


@pytest.mark.parametrize("text", ["a`b``c", "*a* _b_ <b> [c](d) | # ~~e~~ &amp; !", "\\", "`", "it's"])
def test_text_is_shown_as_it_is(text):
    render = html.MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render
    shown = escape(text, quote=False)
    for markdown in (html.as_markdown(text), html.as_code(text)):
        assert shown in render(f"x {markdown} y").replace("&quot;", '"')
    fence = html.fence_of(text)
    assert render(f"{fence}\n{text}\n{fence}\n") == f"<pre><code>{shown}\n</code></pre>\n"
    assert f"<td>{shown}</td>" in render(f"| a |\n|---|\n| {html.as_markdown(text)} |\n")
