"""The curves of a run, as a picture."""

from __future__ import annotations

from pathlib import Path

from fastmoco.atomic import replacing
from fastmoco.train.metrics import Row

# What the objectives' own losses are called.
LOSS_TITLES = {
    "infonce": "InfoNCE",
    "ntxent": "NT-Xent",
    "supcon": "supervised contrastive",
    "barlow": "Barlow Twins",
    "mixed": "mixed samples, weighted",
}


def draw_curves(rows: list[Row], path: Path) -> None:
    """Draw the metrics over the steps of `rows`, a panel for each kind that they have, to the PNG `path`."""
    from matplotlib.figure import Figure

    if not rows:
        return
    own = [name for name in rows[0] if name in LOSS_TITLES]
    stages = [name for name in rows[0] if name.startswith("stage")]
    panels: list[tuple[str, list[str]]] = [
        *((LOSS_TITLES[name], [name]) for name in own),
        ("stage losses, weighted", stages),
        ("queries whose key is found", ["top1", "top5"]),
        ("embedding spread (1 even, 0 collapsed)", ["embedding_std"]),
        ("kNN of the training images", ["knn_accuracy", "knn_auc"]),
        ("learning rate", ["lr"]),
        ("pairs/s", ["pairs_per_s"]),
    ]
    shown = [(title, [n for n in names if any(n in row for row in rows)]) for title, names in panels]
    shown = [(title, names) for title, names in shown if names]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    width, height = 4.6 * columns, 3.1 * lines
    figure = Figure(figsize=(width, height))
    # Given in inches. To have matplotlib find the margins takes half as long as all else (measured).
    figure.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.7 / (4.6 - 0.8),
        hspace=0.8 / (3.1 - 0.85),
    )
    for place, (title, names) in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            marker = "o" if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=marker, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
