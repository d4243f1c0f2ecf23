"""A picture of what training will see: images beside their two views, with what was drawn for each in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.atomic import replacing
from fastmoco.data.draws import draw
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import PairKind, find_pairs
from fastmoco.data.views import ViewConfig
from fastmoco.ops.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION

_NAMES = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}
_COLOURS = ("tab:cyan", "tab:orange")
_CELL_INCHES, _WORDS_INCHES, _DPI = 2.4, 1.3, 100


@dataclass(frozen=True)
class Example:
    """The two images, (H, W, 3) uint8 or uint16 and mostly one and the same, that two views are cut from, the views
    (size, size, 3) float32 in [0, 1], and their two records."""

    files: tuple[str, str]
    images: tuple[np.ndarray, np.ndarray]
    views: tuple[np.ndarray, np.ndarray]
    drawn: tuple[np.void, np.void]


def examples(
    manifest: Manifest,
    views: ViewConfig,
    *,
    seed: int,
    epoch: int,
    count: int,
    kind: LoaderKind,
    workers: int | None = None,
    pairs: PairKind = "image",
) -> list[Example]:
    """The first `count` images of `epoch` (all, if there are fewer) with the very views that training would use.

    Raises UserError as `make_loader` and `find_pairs` do.
    """
    order = Order(len(manifest), min(count, len(manifest)), seed, pairs=find_pairs(pairs, manifest))
    t = epoch * order.batches_per_epoch
    # Without a quarantine the batch is what was ordered, or none.
    slots = order.batch(t)
    with make_loader(kind, manifest, views, order, start=t, stop=t + 1, workers=workers) as batches:
        batch = next(batches)
    made = [view.permute(0, 2, 3, 1).to("cpu", torch.float32).numpy() for view in (batch.q, batch.k)]
    drawn = [
        draw(views, seed=seed, epoch=epoch, indices=slots.indices, view=view, sizes=manifest.sizes[shown])
        for view, shown in enumerate((slots.indices, slots.keys))
    ]
    return [
        Example(
            (manifest.files[i], manifest.files[k]), (manifest.decode(i), manifest.decode(k)),
            (made[0][row], made[1][row]), (drawn[0][row], drawn[1][row]),
        )
        for row, (i, k) in enumerate(zip(slots.indices.tolist(), slots.keys.tolist(), strict=True))
    ]  # fmt: skip


def in_words(view: np.void) -> list[str]:
    """What the record `view` (of dtype `fastmoco.ops.views.VIEW`) does to an image, a line each, in order."""
    top, left, height, width = view["window"].tolist()
    words = []
    if view["resized"].any():
        words.append("resized to {} x {}".format(*view["resized"].tolist()))
    if [top, left, height, width] != [0, 0, *view["resized"].tolist()]:
        words.append(f"crop {height} x {width} at {top}, {left}")
    colours = [word for which in view["order"] if (word := _colour(int(which), float(view["factor"][which])))]
    words += [", ".join(colours[i : i + 2]) for i in range(0, len(colours), 2)]
    rest = [
        "gray" if view["gray"] else "",
        f"blur {view['sigma']:.2f} px" if view["sigma"] > 0 else "",
        f"rotated {view['angle']:+.1f}\N{DEGREE SIGN}" if view["angle"] != 0 else "",
        "flipped" if view["flip"] else "",
    ]
    return words + ([", ".join(filter(None, rest))] if any(rest) else [])


def _colour(which: int, factor: float) -> str:
    if factor == NEUTRAL[which]:
        return ""
    return f"hue {360 * factor:+.0f}\N{DEGREE SIGN}" if which == HUE else f"{_NAMES[which]} x{factor:.2f}"


def save_preview(shown: Sequence[Example], path: Path) -> None:
    """Draw `shown` as a grid to the PNG file `path`: image, query and key, or, where any key is cut from another image,
    both images beside both views. Raises OSError where it cannot be written."""
    # Drawn on a canvas of its own: nothing global of matplotlib is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = 2 if len(shown) > 3 else 1
    down = -(-len(shown) // across)
    each = 4 if any(example.files[0] != example.files[1] for example in shown) else 3
    size = (each * across * _CELL_INCHES, down * (_CELL_INCHES + _WORDS_INCHES))
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    cells = figure.subplots(down, each * across, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    for number, example in enumerate(shown):
        row, column = number % down, number // down
        *originals, query, key = cells[row, each * column : each * (column + 1)]
        if each == 3:
            _show_original(originals[0], example, (0, 1))
        else:
            _show_original(originals[0], example, (0,))
            _show_original(originals[1], example, (1,))
        for axes, name, colour, view, drawn in zip(
            (query, key), ("query", "key"), _COLOURS, example.views, example.drawn, strict=True
        ):
            axes.imshow(view, interpolation="nearest", vmin=0, vmax=1)
            axes.set_title(name, fontsize=9, color=colour)
            _write_below(axes, in_words(drawn))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _show_original(axes: Any, example: Example, views: tuple[int, ...]) -> None:
    """The image with the windows that become those `views` (0: query, 1: key), all of which are cut from it."""
    from matplotlib.patches import Rectangle

    image, file = example.images[views[0]], example.files[views[0]]
    axes.imshow(image.astype(np.float32) / np.iinfo(image.dtype).max, interpolation="nearest")
    height, width = image.shape[:2]
    for view in views:
        drawn, colour = example.drawn[view], _COLOURS[view]
        top, left, tall, wide = drawn["window"].tolist()
        # The window is in pixels of the resized image.
        y, x = (height / drawn["resized"][0], width / drawn["resized"][1]) if drawn["resized"].any() else (1.0, 1.0)
        corner = (left * x - 0.5, top * y - 0.5)
        axes.add_patch(Rectangle(corner, wide * x, tall * y, fill=False, edgecolor=colour, linewidth=2, clip_on=False))
    # A dollar sign in a name is no formula.
    axes.set_title(_shortened(file), fontsize=8, parse_math=False)
    _write_below(axes, [f"{height} x {width}"])


def _write_below(axes: Any, lines: list[str]) -> None:
    axes.text(0.5, -0.03, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=8)


def _shortened(name: str) -> str:
    printable = name.encode(errors="backslashreplace").decode()
    return printable if len(printable) <= 32 else f"...{printable[-29:]}"
