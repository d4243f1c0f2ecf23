"""A report as one HTML file: no script, and nothing fetched from anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from fastmoco.evaluate.pictures import svg
from fastmoco.study.report.blocks import Block, Code, Heading, Listing, Picture, Table, Text

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 60rem;
  padding: 0 1rem 4rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .6rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
nav ul { padding-left: 1.2rem; } nav a { color: #0b5394; }
p.strong { background: #eef4fb; border-left: 4px solid #0072b2; padding: .6rem .8rem; font-weight: 600; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption, caption { color: #444; font-size: .875rem; text-align: left; padding: .3rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #888; white-space: normal; min-width: 5rem; vertical-align: bottom; }
tbody tr:nth-child(even) td { background: #f7f7f7; }
ul.notes { list-style: none; padding: 0; margin: -.6rem 0 1rem; color: #444; } ul.notes li { font-size: .8rem; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: .875rem; }
details { margin: 1rem 0; } summary { cursor: pointer; } li { font-size: .9rem; }
@media (max-width: 40rem) { body { font-size: 15px; padding: 0 .6rem 3rem; } }
@media print { body { max-width: none; font-size: 10pt; } nav { display: none; } .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; } th, td { white-space: normal; padding: .1rem .3rem; } table { font-size: 8pt; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; } }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page. Its policy forbids the browser any request, its own included."""
    anchors = _anchors(blocks)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # data: for the icon, which browsers would otherwise ask for.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    contents = [
        f'<li><a href="#{anchors[place]}">{escape(block.text)}</a></li>'
        for place, block in enumerate(blocks)
        if isinstance(block, Heading) and block.level == 2
    ]
    parts.append(f"<nav><ul>{''.join(contents)}</ul></nav>")
    parts += [_html(block, anchors.get(place, "")) for place, block in enumerate(blocks)]
    return "\n".join([*parts, "</body>\n</html>\n"])


def _html(block: Block, anchor: str) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{anchor}">{escape(block.text)}</h{block.level}>'
        case Text():
            kind = ' class="strong"' if block.strong else ""
            return f"<p{kind}>{escape(block.text)}</p>"
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case Listing():
            return _listing(block)
        case Table():
            return _table(block)
        case Picture():
            drawn = svg(block.figure, label=block.caption)
            return f'<figure id="picture-{block.name}">{drawn}<figcaption>{escape(block.caption)}</figcaption></figure>'


def _listing(block: Listing) -> str:
    if not block.items:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in block.items)
    if block.folded:
        return _folded(block.summary, f"<ul>{items}</ul>")
    return (f"<p>{escape(block.summary)}:</p>" if block.summary else "") + f"<ul>{items}</ul>"


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in block.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in block.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in block.notes)
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    # Wide tables scroll in a box of their own, which the keyboard reaches too.
    table = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(block.caption)}"><table>'
        f"<caption>{escape(block.caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>" + notes
    )
    return _folded(block.summary, table) if block.summary else table


def _anchors(blocks: Sequence[Block]) -> dict[int, str]:
    """An id for each heading, by its place: its words, and a number where they were there before."""
    taken: dict[str, int] = {}
    anchors = {}
    for place, block in enumerate(blocks):
        if isinstance(block, Heading):
            words = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-") or "part"
            taken[words] = taken.get(words, 0) + 1
            anchors[place] = words if taken[words] == 1 else f"{words}-{taken[words]}"
    return anchors
