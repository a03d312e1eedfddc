"""A page that needs nothing else."""

import base64

import pytest

from pipeline import html

MARKDOWN = """# A < B

Some *text* with <script>alert(1)</script> in it.

| network | accuracy |
|---|---|
| full | 92.33 % |

![a picture](one.png)
"""


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "one.png").write_bytes(b"\x89PNG one")
    return tmp_path


def test_pictures_are_inside_and_nothing_is_fetched(pictures):
    page = html.page(MARKDOWN, pictures)
    assert base64.b64encode(b"\x89PNG one").decode() in page
    assert 'src="one.png"' not in page
    assert "http" not in page.replace("http-equiv", "")


def test_text_stays_text_and_the_title_is_the_heading(pictures):
    page = html.page(MARKDOWN, pictures)
    assert "<title>A &lt; B</title>" in page
    assert "<script>" not in page
    assert "<em>text</em>" in page
    assert "<td>92.33 %</td>" in page


def test_missing_picture_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        html.page(MARKDOWN, tmp_path)
