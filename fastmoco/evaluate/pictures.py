"""Figures as files: SVG that may stand inside a page, and PNG. The same figure gives the same bytes."""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

DPI = 150


def svg(figure: Figure, *, label: str) -> str:
    """The `<svg>` element of `figure`, to be put into a page as it is; `label` is read to who cannot see it.

    Text stays text. Several may stand in one page: no id is left but those that the drawing itself refers to, which
    are made of its contents. It has a width and a height, and a view box by which a page may scale it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmoco"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A hundredth of a point is finer than any screen, and half the size.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\.(\d\d)\d+", r".\1", path[0]), text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()


def png(figure: Figure) -> bytes:
    """`figure` as a PNG file of 150 dots an inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
