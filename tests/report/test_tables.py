"""Tables in Markdown keep the text of their cells."""

from markdown_it import MarkdownIt

from pipeline.report.html import as_markdown
from pipeline.report.tables import markdown_table


def test_markdown_table_shows_cells_as_they_are():
    rows = [("**a**", "1.50", ""), (as_markdown("x|y"), "0012", "1e5")]
    html = MarkdownIt("commonmark").enable("table").render(markdown_table(("name", "n", ""), rows))
    for cell in ("<strong>a</strong>", "1.50", "x|y", "0012", "1e5"):
        assert f"<td>{cell}</td>" in html
    assert html.count("<tr>") == 3
