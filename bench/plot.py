"""One picture of a benchmark: the medians of every implementation, case by case, against their floor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "no plot: matplotlib is not installed"


def save_plot(rows: list[dict[str, Any]], path: Path, *, title: str) -> str:
    """Draw `rows` to `path` (.png) and say so; where matplotlib is missing, or nothing was timed, say that instead."""
    timed = [row for row in rows if row["p50_ms"] is not None]
    if not timed:
        return "no plot: nothing was timed"
    cases = list(dict.fromkeys(label(row) for row in timed))
    figure = _figure(max(7.0, 0.8 * len(cases)), 6)
    if figure is None:
        return NO_MATPLOTLIB
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["implementation"] for row in timed):
        points = {label(row): row["p50_ms"] for row in timed if row["implementation"] == name}
        # A line through neighbouring cases; a gap where the implementation did not run.
        axes.plot(range(len(cases)), [points.get(case, float("nan")) for case in cases], "o-", label=name)
    floors = {label(row): row["floor_ms"] for row in timed}
    axes.plot(range(len(cases)), [floors[case] for case in cases], "k--", label="floor")
    axes.set_yscale("log")
    axes.set_ylabel("median, ms")
    axes.set_title(title, wrap=True)
    axes.set_xticks(range(len(cases)), cases, rotation=40, ha="right", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def save_speeds(rows: list[dict[str, Any]], path: Path, *, title: str) -> str:
    """Draw pairs a second, 20 to 80 % as whiskers, in one panel for each set of images; returns what it did."""
    timed = [row for row in rows if "pairs_per_s" in row]
    if not timed:
        return "no plot: nothing was timed"
    sets = list(dict.fromkeys(row["images"] for row in timed))
    names = list(dict.fromkeys(row["implementation"] for row in timed))[::-1]
    figure = _figure(8, 0.6 + len(sets) * (0.8 + 0.28 * len(names)))
    if figure is None:
        return NO_MATPLOTLIB
    figure.suptitle(title)
    for axes, images in zip(figure.subplots(len(sets), squeeze=False)[:, 0], sets, strict=True):
        own = {row["implementation"]: row for row in timed if row["images"] == images}
        for place, name in enumerate(names):
            if name in own:
                row = own[name]
                speed, slow, fast = (row[f"{which}pairs_per_s"] for which in ("", "slow_", "fast_"))
                ours = name.startswith("fastmoco")
                # Points, as a bar has no foot on a logarithmic scale; hollow where it is a part of the work.
                axes.errorbar(
                    speed, place, xerr=[[speed - slow], [fast - speed]], fmt="o", color="C0" if ours else "C7",
                    markerfacecolor="white" if name.endswith(" alone") else None,
                )  # fmt: skip
                axes.text(fast, place, f"  {speed:.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("pairs/s (log scale)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(images, fontsize=9)
    return _save(figure, path)


def save_curves(curves: Mapping[str, np.ndarray], path: Path, *, title: str) -> str:
    """Draw losses (seeds, steps) by name: the mean over the seeds, a standard deviation shaded; returns what it did."""
    figure = _figure(8, 5)
    if figure is None:
        return NO_MATPLOTLIB
    axes = figure.add_subplot()
    for name, losses in curves.items():
        steps, mean, deviation = np.arange(1, losses.shape[1] + 1), losses.mean(0), losses.std(0, ddof=1)
        (line,) = axes.plot(steps, mean, label=name)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def label(row: dict[str, Any]) -> str:
    """A case's name on the axis: its sizes, which stand between the implementation and the dtype."""
    names = list(row)
    sizes = names[names.index("implementation") + 1 : names.index("dtype")]
    return " ".join([row["op"], *(f"{name} {row[name]}" for name in sizes), row["dtype"]])


def _figure(width: float, height: float) -> Figure | None:
    """An empty figure, of so many inches, that needs no display; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"plot: {path}"
