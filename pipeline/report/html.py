"""Markdown as one HTML page that needs nothing else: pictures are inside."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from pipeline.infra.safe_io import printable

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --line: #dfe1e5; --strong: #8a8d91;
        --soft: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e7e9ec; --line: #34383f; --strong: #7d828a; --soft: #22252b; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--strong); }
img { max-width: 100%; height: auto; margin: .6rem 0; background: #fff; border-radius: .3rem; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; max-height: 22rem; font-size: .85rem; }
code { background: var(--soft); }
"""


def page(markdown: str, pictures: Path) -> str:
    """A whole HTML document; the text's first heading is its title, its PNG files are in `pictures`.

    Raises:
        FileNotFoundError: a picture isn't there.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inside(found: re.Match[str]) -> str:
        content = base64.b64encode((pictures / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )


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
