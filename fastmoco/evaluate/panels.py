"""How figures are laid out: 6.4 inches wide with text of 11 points and more, so that they can be read on a telephone
and in print."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.4, 4.0
SMALLEST = 11.0
TEXT = 12.0


def make_panels(count: int, title: str, *, columns: int = 3, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of `columns`, at least `height` inches high; more rows than one make it
    higher, never wider."""
    columns = min(columns, max(1, count))
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, max(height, 1.2 + 2.1 * rows)), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 1)
    places = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    for axes in places:
        axes.tick_params(labelsize=SMALLEST)
        axes.xaxis.label.set_fontsize(TEXT)
        axes.yaxis.label.set_fontsize(TEXT)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places
