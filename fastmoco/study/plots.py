"""The pictures of a report, each from plain numbers to a matplotlib figure.

All are laid out by `fastmoco.evaluate.panels`. A method has one colour, marker and dash everywhere (Okabe and Ito's
colours, told apart by colour-blind readers; markers and dashes without any colour). What is drawn is what is given; of
outputs, their KS distance is marked too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from fastmoco.evaluate.cka import Reuse
from fastmoco.evaluate.ks import greatest_gap
from fastmoco.evaluate.panels import SMALLEST, TEXT, make_panels


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a method looks everywhere."""

    label: str
    colour: str
    marker: str
    dash: str


STYLES: dict[str, Style] = {
    "scratch": Style(label="from scratch", colour="#000000", marker="s", dash=":"),
    "random": Style(label="random weights", colour="#7F7F7F", marker="x", dash="--"),
    "moco": Style(label="MoCo", colour="#0072B2", marker="o", dash="-"),
    "mse": Style(label="MoCo + MSE", colour="#D55E00", marker="^", dash="-"),
    "barlow": Style(label="MoCo + Barlow", colour="#009E73", marker="D", dash="-"),
}
# Whatever has no style of its own: baselines by their order, and curves that belong to no method.
_SPARE = ("#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5E3C99", "#333333")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: `y` over `x`, of one length, with the interval `low` to `high` where there is one.

    `method` is a key of `STYLES`, or any other name, which is then its own label. None and NaN in `y` are gaps. `x` is
    the number of labelled images, the place of a stage or an epoch.
    """

    method: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A baseline: one score however many labels or whichever stage, drawn as a dashed line across."""

    label: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Output probabilities for one class, (n,) each and finite: of a run with few labels and of its all-label run.

    `mean` is the KS distance over all runs, of which these are one pair. `method` gives the colour.
    """

    title: str
    few: np.ndarray
    full: np.ndarray
    mean: float | None = None
    method: str = ""


def style(method: str, place: int = 0) -> Style:
    """The style of `method`; one that has none gets the `place`-th spare colour and its name as its label."""
    spare = _SPARE[place % len(_SPARE)]
    return STYLES.get(method) or Style(label=method, colour=spare, marker="", dash="-")


def label_of(method: str) -> str:
    """What a method, a start or a baseline is called wherever it is shown."""
    return style(method).label


def reuse_bars(panels: Mapping[str, Mapping[str, Mapping[str, Reuse]]], *, title: str) -> Figure:
    """Feature reuse by stage, a group of bars a stage and a bar a method; `panels` is by kernel, a panel each under
    its name, then by method, then by stage.

    Whiskers are one standard deviation over the draws. A stage that a method lacks has no bar.
    """
    figure, places = make_panels(len(panels), title, columns=1)
    for axes, (kernel, reuse) in zip(places, panels.items(), strict=True):
        _draw_bars(axes, reuse)
        axes.set_title(kernel, fontsize=TEXT)
    _legend(figure, places)
    return figure


def _draw_bars(axes: Axes, reuse: Mapping[str, Mapping[str, Reuse]]) -> None:
    stages = list(dict.fromkeys(stage for found in reuse.values() for stage in found))
    width = 0.8 / max(1, len(reuse))
    for place, (method, found) in enumerate(reuse.items()):
        look = style(method, place)
        known = [(stages.index(stage), value) for stage, value in found.items()]
        x = [at + (place - (len(reuse) - 1) / 2) * width for at, _ in known]
        axes.bar(
            x,
            [value.mean for _, value in known],
            0.92 * width,
            yerr=[value.std for _, value in known],
            color=look.colour,
            alpha=0.85,
            capsize=2,
            error_kw={"ecolor": "#555555"},
            label=look.label,
        )
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    axes.set_ylabel("CKA")
    axes.grid(axis="x", visible=False)


def ks_curves(outputs: Sequence[Outputs], *, title: str) -> Figure:
    """Both empirical distribution functions of each of `outputs`, a panel each, with the KS distance marked.

    Dashed: few labels; solid: all labels; the upright bar is the greatest gap, and the title says its height. Each
    panel spans the outputs that it shows.
    """
    columns = 2 if len(outputs) in (2, 4) else 3
    figure, places = make_panels(len(outputs), title, columns=columns)
    for place, (axes, output) in enumerate(zip(places, outputs, strict=True)):
        colour = style(output.method, 5).colour
        for values, dash in ((output.few, "--"), (output.full, "-")):
            axes.ecdf(values, color=colour, linestyle=dash, linewidth=1.6)
        gap = greatest_gap(output.few, output.full)
        axes.plot([gap.at, gap.at], [gap.low, gap.high], color="black", linewidth=2.2, marker="_", markersize=9)
        mean = "" if output.mean is None else f" (mean {output.mean:.2f})"
        axes.set_title(f"{output.title}\nKS {gap.distance:.2f}{mean}", fontsize=SMALLEST)
        axes.set(ylim=(0.0, 1.02), yticks=(0, 0.5, 1))
        axes.locator_params(axis="x", nbins=4)
        if place + columns >= len(outputs):
            axes.set_xlabel("output")
        if place % columns == 0:
            axes.set_ylabel("images below")
    samples = [Line2D([], [], color="#333333", linestyle=dash, linewidth=1.6) for dash in ("--", "-")]
    figure.legend(samples, ["few labels", "all labels"], loc="outside lower center", ncols=2, fontsize=SMALLEST)
    return figure


def low_label_curves(
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    title: str,
    score: str,
    ticks: Mapping[float, str] | None = None,
) -> Figure:
    """Score over the number of labelled images on a logarithmic axis, a line a method with its interval as a band.

    `ticks` names the places on the axis, such as {24: "24 (1 %)"}; without it they are the numbers of the lines.
    """
    figure, (axes,) = make_panels(1, title)
    _draw(axes, lines, levels)
    axes.set_xscale("log")
    named = ticks or {x: f"{x:g}" for x in sorted({x for line in lines for x in line.x})}
    axes.set_xticks(list(named), list(named.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set(xlabel="labelled training images", ylabel=score)
    _legend(figure, [axes])
    return figure


def probe_curves(
    stages: Sequence[str], lines: Sequence[Line], levels: Sequence[Level] = (), *, title: str, score: str
) -> Figure:
    """Score of a probe over the stages it reads, a line a method; a line's `x` counts the stages from 0."""
    figure, (axes,) = make_panels(1, title)
    _draw(axes, lines, levels)
    axes.set_xticks(range(len(stages)), stages)
    axes.set(xlabel="features of", ylabel=score)
    _legend(figure, [axes])
    return figure


def training_curves(panels: Mapping[str, Sequence[Line]], *, title: str, xlabel: str = "epoch") -> Figure:
    """Metrics of training, a panel each by their names, a line a run."""
    figure, places = make_panels(len(panels), title, columns=2)
    for axes, (name, lines) in zip(places, panels.items(), strict=True):
        _draw(axes, lines, (), markers=False)
        axes.set_title(name, fontsize=TEXT)
        axes.set_xlabel(xlabel)
    _legend(figure, places)
    return figure


def _draw(axes: Axes, lines: Sequence[Line], levels: Sequence[Level], *, markers: bool = True) -> None:
    for place, line in enumerate(lines):
        look = style(line.method, place)
        y = np.array(line.y, dtype=np.float64)
        axes.plot(
            line.x,
            y,
            color=look.colour,
            linestyle=look.dash,
            # A point between two gaps shows by its marker only.
            marker=(look.marker or "o") if markers or np.isfinite(y).sum() == 1 else "",
            markersize=5,
            linewidth=1.6,
            label=look.label,
        )
        if line.low is not None and line.high is not None:
            low, high = (np.array(bound, dtype=np.float64) for bound in (line.low, line.high))
            # Bands of several methods lie over each other: their edges tell them apart.
            face, edge = to_rgba(look.colour, 0.1), to_rgba(look.colour, 0.6)
            axes.fill_between(line.x, low, high, facecolor=face, edgecolor=edge, linewidth=0.8, linestyle=look.dash)
    for place, level in enumerate(levels):
        axes.axhline(level.value, color=_SPARE[place % len(_SPARE)], linestyle="--", linewidth=1.2, label=level.label)


def _legend(figure: Figure, places: Sequence[Axes]) -> None:
    """One for all panels, below them, where it hides nothing."""
    shown: dict[str, Any] = {}
    for axes in places:
        handles, texts = axes.get_legend_handles_labels()
        shown.update(zip(texts, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=SMALLEST)
