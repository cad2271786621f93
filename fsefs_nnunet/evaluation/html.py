"""Pieces of an HTML page that is one file: pictures are inside, nothing is loaded from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from html import escape

from fsefs_nnunet.evaluation.tables import cell_text, columns_of

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.charts {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.charts figure {{ flex: 1 1 18rem; max-width: 31rem; }}
figure {{ margin: 0 0 1rem; }}
img {{ display: block; width: 100%; border-radius: 4px; }}
.wide img {{ min-width: 44rem; }}
figcaption {{ font-size: 0.9rem; }}
pre {{ overflow-x: auto; padding: 0.75rem; border: 1px solid var(--line); border-radius: 4px; font-size: 0.85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, *parts: str) -> str:
    """The whole page of `parts`, which the functions below make; `title` is plain text, as what they take."""
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def commands(*lines: str) -> str:
    """Lines for a shell."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def folded(summary: str, text: str) -> str:
    """A long text under its summary, shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>{commands(text)}</details>"


def table(rows: list[dict]) -> str:
    """Columns and numbers as in markdown_table; it scrolls on a narrow screen."""
    columns = columns_of(rows)
    lines = [_row("th", columns), *(_row("td", [cell_text(row.get(key)) for key in columns]) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def charts(pictures: dict[str, bytes]) -> str:
    """PNGs by caption, side by side where there is room."""
    return f'<div class="charts">{"".join(_figure(png, caption) for caption, png in pictures.items())}</div>'


def overlay(png: bytes, caption: str) -> str:
    """A picture of several panels: it scrolls on a narrow screen instead of shrinking."""
    return f'<div class="scroll wide">{_figure(png, caption)}</div>'


def _figure(png: bytes, caption: str) -> str:
    data = b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
