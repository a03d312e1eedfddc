"""Markdown as one HTML page that needs nothing else: pictures are inside."""

import base64
import html
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline.infra.safe_io import printable

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --line: #dfe1e5; --strong: #8a8d91;
        --soft: #f5f6f7; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e7e9ec; --line: #34383f; --strong: #7d828a; --soft: #22252b;
          --link: #8ab4f8; } }
html { scroll-behavior: smooth; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 70rem; margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
a { color: var(--link); }
h1 + p { font-size: .92rem; }
nav { font-size: .92rem; border: solid var(--line); border-width: 1px 0; padding: .5rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; margin: 0;
         padding: 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .88rem;
        line-height: 1.4; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
         vertical-align: top; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
thead th { border-bottom: 2px solid var(--strong); vertical-align: bottom; }
th.words, td.words { text-align: left; min-width: 13rem; }
th.words:first-child, td.words:first-child { min-width: 7rem; }
@media (max-width: 40rem) { td:first-child { max-width: 8rem; } ul { padding-left: 1.2rem; } }
.picture { overflow-x: auto; background: #fff; border-radius: .3rem; }
.picture img { display: block; width: 100%; min-width: 36rem; height: auto; }
@media (prefers-color-scheme: dark) { .chart { background: none; }
  .chart img { filter: invert(.91) hue-rotate(180deg); } }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; max-height: 22rem; font-size: .85rem; }
code { background: var(--soft); }
"""
WORDS = 20  # letters in a cell from which on its column is one of words, not of numbers
SAFE = " !$()*+,-./:;=?@[]^_`{|}~'"  # what a data URI takes as it is


def page(markdown: str, pictures: Path) -> str:
    """A whole HTML document; the text's first heading is its title, the second ones are its contents.

    Pictures are inside: of a PNG file in the folder `pictures` the SVG beside it, where there is one.

    Raises:
        FileNotFoundError: a picture isn't there.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    contents = _contents(tokens)
    _mark_words(tokens)
    for opening, inline in pairwise(tokens):
        children = inline.children or []
        for child in children:
            if child.type == "image":
                png = pictures / str(child.attrGet("src"))
                child.attrSet("src", _data_uri(png))
                kind = "picture chart" if _is_chart(png) else "picture"
        if opening.type == "paragraph_open" and [child.type for child in children] == ["image"]:
            opening.attrSet("class", kind)
    types = [token.type for token in tokens]
    head = types.index("paragraph_close") + 1 if "paragraph_close" in types else 0
    body = "".join(
        parser.renderer.render(part, parser.options, {}) + between
        for part, between in ((tokens[:head], contents), (tokens[head:], ""))
    )
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )


def _contents(tokens: Sequence[Token]) -> str:
    """Give each second heading an anchor, as GitHub names it; a list of links to them."""
    links = ""
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h2":
            anchor = re.sub(r"[^\w\- ]", "", inline.content.lower()).replace(" ", "-")
            opening.attrSet("id", anchor)
            links += f'<li><a href="#{anchor}">{html.escape(inline.content)}</a></li>\n'
    return f'<nav aria-label="contents">\n<ul>\n{links}</ul>\n</nav>\n' if links else ""


def _mark_words(tokens: Sequence[Token]) -> None:
    """Give the cells of a table's columns of words the class `words`."""
    cells: dict[int, list[Token]] = {}  # of the table, by column
    worded: set[int] = set()
    column = 0
    for opening, inline in pairwise(tokens):
        if opening.type == "table_open":
            cells, worded = {}, set()
        elif opening.type == "tr_open":
            column = 0
        elif opening.type in ("th_open", "td_open"):
            cells.setdefault(column, []).append(opening)
            if opening.type == "td_open" and sum(map(str.isalpha, inline.content)) > WORDS:
                worded.add(column)
            column += 1
        elif opening.type == "table_close":
            for cell in (cell for number in worded for cell in cells[number]):
                cell.attrSet("class", "words")


def _is_chart(png: Path) -> bool:
    """Whether a picture is lines and text alone, whose brightness may be inverted on a dark page."""
    svg = png.with_suffix(".svg")
    return svg.exists() and "<image" not in svg.read_text(encoding="utf-8")


def _data_uri(png: Path) -> str:
    """A picture as an address; not in base64 where it is text, which would make it a third larger."""
    svg = png.with_suffix(".svg")
    if svg.exists():
        text = svg.read_text(encoding="utf-8").replace("\n", " ")
        return f"data:image/svg+xml;charset=utf-8,{quote(text, safe=SAFE)}"
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def as_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", printable(text))


def as_code(text: str) -> str:
    """Markdown that shows this very text as code in a line; backticks in it do not end it."""
    fence = fence_of(text, shortest=1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{printable(text)}{padding}{fence}"


def fence_of(text: str, *, shortest: int = 3) -> str:
    """Backticks that begin and end code: more than stand together within it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)
