"""One picture of a benchmark: the medians of every implementation, case by case, above their floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_plot(rows: list[dict[str, Any]], path: Path, *, title: str) -> str:
    """Draw `rows` to `path` (.png) and say so; where matplotlib is missing, or nothing was timed, say that instead."""
    timed = [row for row in rows if row["p50_ms"] is not None]
    if not timed:
        return "no plot: nothing was timed"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no plot: matplotlib is not installed"
    cases = list(dict.fromkeys(label(row) for row in timed))
    figure = Figure(figsize=(max(7.0, 0.8 * len(cases)), 6), layout="constrained")
    FigureCanvasAgg(figure)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"plot: {path}"


def label(row: dict[str, Any]) -> str:
    """A case's name on the axis: its sizes, which stand between the implementation and the dtype."""
    names = list(row)
    sizes = names[names.index("implementation") + 1 : names.index("dtype")]
    return " ".join([row["op"], *(f"{name} {row[name]}" for name in sizes), row["dtype"]])
