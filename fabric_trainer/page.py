"""The pieces of the report's page: HTML as strings, and one style."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from fabric_trainer.curves import Line

STYLE = """
:root { color: #0f172a; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 3.5rem 2rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; overflow-wrap: anywhere; }
header p { color: #64748b; margin: 0.4rem 0 0; }
h2 { font-size: 1.15rem; letter-spacing: -0.01em; margin: 0 0 1rem; }
section { margin-top: 3rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1.25rem 3rem; margin: 2rem 0 0; padding: 1.25rem 0;
  border: solid #e2e8f0; border-width: 1px 0; }
.facts dt { color: #64748b; font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; letter-spacing: -0.01em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0; border-bottom: 1px solid #e2e8f0; text-align: left; font-weight: 400; }
td, thead th + th { text-align: right; padding-left: 3rem; }
thead th { color: #64748b; font-size: 0.8rem; }
small { color: #94a3b8; font-size: 0.85em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 2rem 2.5rem; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.9rem; font-weight: 600; margin-bottom: 0.35rem; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { max-width: max-content; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.legend { font-weight: 400; color: #64748b; font-size: 0.8rem; white-space: nowrap; margin-left: 0.9rem; }
.legend b { color: #dc2626; }
.legend i { display: inline-block; width: 1rem; border-top: 2px solid; vertical-align: middle; margin-right: 0.35rem; }
details { margin-top: 1.5rem; border-top: 1px solid #e2e8f0; padding-top: 1.25rem; }
section + details { margin-top: 3.5rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.05rem; }
pre { background: #f8fafc; border-radius: 8px; padding: 1rem 1.25rem; overflow-x: auto; line-height: 1.5;
  font: 0.8rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.3rem 2rem; font-size: 0.9rem; }
.pairs dt { color: #64748b; }
.pairs dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  main { padding: 2rem 1.1rem; }
  td, thead th + th { padding-left: 1rem; }
  .wide { overflow-x: auto; }
  .wide svg { min-width: 640px; }
}
@media print { details { display: none; } main { padding: 0; } section { break-inside: avoid; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document of the parts that aren't empty. Nothing in it comes from elsewhere."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, figures: Sequence[str]) -> str:
    """A heading and a grid of figures; nothing without figures."""
    if not figures:
        return ""
    inner = "\n".join(figures)
    return f'<section>\n<h2>{escape(title)}</h2>\n<div class="grid">\n{inner}\n</div>\n</section>'


def table(title: str, headings: Sequence[str], rows: Sequence[str]) -> str:
    """A heading and a table of ready <tr> rows; nothing without rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(rows)
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n<table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</section>"
    )


def curve(title: str, lines: Sequence[Line], svg: str, wide: bool = False) -> str:
    """A drawn chart with its title, and a legend where there is more than one line."""
    legend = "".join(
        f'<span class="legend"><i style="border-color:{line.color};{_look(line)}"></i>{escape(line.label)}</span>'
        for line in lines
        if len(lines) > 1
    )
    if bad := sum(int((~np.isfinite(line.y)).sum()) for line in lines):
        legend += f'<span class="legend"><b>×</b> not finite ({bad:,})</span>'
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>\n<figcaption>{escape(title)}{legend}</figcaption>\n{svg}\n</figure>"


def image(title: str, png: bytes, wide: bool = False) -> str:
    """A PNG inside the page."""
    source = base64.b64encode(png).decode()
    kind = ' class="wide"' if wide else ""
    return (
        f"<figure{kind}>\n<figcaption>{escape(title)}</figcaption>\n"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{source}">\n</figure>'
    )


def details(title: str, inner: str) -> str:
    """Something that opens on a click; nothing where there is nothing inside."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{inner}\n</details>" if inner else ""


def _look(line: Line) -> str:
    return "opacity:.45" if line.faint else "border-top-style:dashed" if line.dashed else ""
