"""CKA as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from fastmoco.evaluate.cka import Alignments
from fastmoco.evaluate.panels import SMALLEST, TEXT, make_panels


def cka_heat_map(found: Alignments, *, title: str, rows: str = "", columns: str = "") -> Figure:
    """CKA of each stage of one checkpoint (down) with each of another (across), numbers in the cells.

    One scale from 0 to 1 in every picture, so that pictures can be compared: a value outside takes the colour of the
    end, and shows its own number. A value that is not defined is "n/a".
    """
    figure, (axes,) = make_panels(1, title, height=4.6)
    image = axes.imshow(found.values, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(found.columns)), found.columns)
    axes.set_yticks(range(len(found.rows)), found.rows)
    # Names of files may hold a $, which would begin a formula.
    axes.set_xlabel(columns, parse_math=False)
    axes.set_ylabel(rows, parse_math=False)
    axes.grid(False)
    for (i, j), value in np.ndenumerate(found.values):
        # Undefined cells stay as white as the paper.
        ink = "white" if value < 0.45 else "black"
        shown = "n/a" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, shown, ha="center", va="center", fontsize=TEXT, color=ink)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("CKA", size=TEXT)
    bar.ax.tick_params(labelsize=SMALLEST)
    return figure
