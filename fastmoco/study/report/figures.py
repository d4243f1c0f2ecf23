"""The pictures of one set of images: scores over labels and stages, and training."""

from __future__ import annotations

from collections.abc import Sequence

from fastmoco.study import plots
from fastmoco.study.report.blocks import Block, Heading, Picture, Text
from fastmoco.study.report.gather import BASELINES, FULL, Findings
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.report.words import share
from fastmoco.study.work.similarity import STAGES
from fastmoco.train.curves import LOSS_TITLES

_AUC = "test AUC"


def label_curves(own: Statistics) -> list[Block]:
    """Score over labels, by fine-tuning and by probe of stage 4."""
    found = own.found
    images = _images(found)
    blocks: list[Block] = [Heading(level=3, text="Scores over labels")]
    for measure, inits, said in (
        (FULL, found.inits, "full fine-tuning"),
        ("stage4", found.probed, "linear probe, stage 4"),
    ):
        lines = []
        for init in inits:
            known = [(images[b], own.estimate(measure, init, b)) for b in found.study.grid.budgets if b in images]
            kept = [(x, e) for x, e in known if e is not None]
            if kept:
                lines.append(
                    plots.Line(
                        method=init,
                        x=[x for x, _ in kept],
                        y=[e.value for _, e in kept],
                        low=[e.low for _, e in kept],
                        high=[e.high for _, e in kept],
                    )
                )
        if lines:
            ticks = {images[b]: _tick(found, b, images[b]) for b in sorted(images)}
            figure = plots.low_label_curves(
                lines, _levels(own, 1.0), title=f"{found.data.name}: {said}", score=_AUC, ticks=ticks
            )
            caption = (
                f"{found.data.name}: AUC over labelled images by {said}, with 95 % intervals; baselines with all labels"
            )
            blocks.append(Picture(name=f"{found.data.name}-labels-{measure}", caption=caption, figure=figure))
    return blocks


def stage_curves(own: Statistics) -> list[Block]:
    """Probes of every stage, a picture a budget."""
    found = own.found
    blocks: list[Block] = [Heading(level=3, text="Probes by stage")]
    for budget in found.study.grid.budgets:
        lines = []
        for init in found.probed:
            values = [own.mean_auc(stage, init, budget) for stage in STAGES]
            if any(value is not None for value in values):
                lines.append(plots.Line(method=init, x=list(range(len(STAGES))), y=values))
        if lines:
            title = f"{found.data.name}: {found.asked(budget)} of labels"
            figure = plots.probe_curves(STAGES, lines, _levels(own, budget), title=title, score=_AUC)
            caption = (
                f"{found.data.name}: test AUC of linear probes by stage, {found.asked(budget)} of the labels, mean of "
                "runs"
            )
            blocks.append(Picture(name=f"{found.data.name}-stages-{budget:g}", caption=caption, figure=figure))
    return blocks


def training(found: Findings) -> list[Block]:
    """What pretraining and fine-tuning did over time, of the first seed."""
    seed = found.study.grid.seeds[0]
    blocks: list[Block] = [Heading(level=3, text="Training curves")]
    panels: dict[str, list[plots.Line]] = {}
    for record in found.of_kind("pretrain"):
        if record["settings"]["seed"] != seed:
            continue
        rows = record["result"]["curve"]
        own = [(name, title) for name, title in LOSS_TITLES.items() if name in rows[0]]
        for name, title in (*own, ("top1", "key found first"), ("embedding_std", "spread (0: collapse)")):
            panels.setdefault(title, []).append(_curve(record["settings"]["method"], rows, "epoch", name))
        stages = [name for name in STAGES if name in rows[0]]
        if stages:
            sums = [{"epoch": row["epoch"], "sum": sum(row[name] or 0.0 for name in stages)} for row in rows]
            panels.setdefault("stage losses, weighted", []).append(
                _curve(record["settings"]["method"], sums, "epoch", "sum")
            )
    if panels:
        blocks.append(
            Picture(
                name=f"{found.data.name}-pretraining",
                caption=f"{found.data.name}: pretraining, seed {seed}",
                figure=plots.training_curves(panels, title=f"{found.data.name}: pretraining"),
            )
        )
    blocks += _fine_tuning(found, seed)
    return blocks if len(blocks) > 1 else [*blocks, Text(text="None yet.")]


def _fine_tuning(found: Findings, seed: int) -> list[Block]:
    panels: dict[str, list[plots.Line]] = {}
    for budget in found.study.grid.budgets:
        for record in found.of_kind("finetune"):
            s = record["settings"]
            own = s["mode"] == FULL and s["target"] == found.data.label
            if own and (s["seed"], s["draw"], s["budget"]) == (seed, 0, budget):
                line = _curve(s["init"], record["result"]["curve"], "step", "validation_auc")
                panels.setdefault(f"validation AUC, {share(budget)}", []).append(line)
    if not panels:
        return []
    figure = plots.training_curves(panels, title=f"{found.data.name}: full fine-tuning", xlabel="step")
    caption = f"{found.data.name}: full fine-tuning, seed {seed}, first draw of the labels"
    return [Picture(name=f"{found.data.name}-finetuning", caption=caption, figure=figure)]


def _curve(method: str, rows: Sequence[dict[str, float | None]], x: str, y: str) -> plots.Line:
    return plots.Line(method=method, x=[row[x] or 0.0 for row in rows], y=[row.get(y) for row in rows])


def _images(found: Findings) -> dict[float, float]:
    """Labelled images at each budget, mean over draws."""
    counts: dict[float, list[int]] = {}
    for row in found.budgets():
        counts.setdefault(row["budget"], []).append(row["images"])
    return {budget: sum(each) / len(each) for budget, each in counts.items()}


def _tick(found: Findings, budget: float, images: float) -> str:
    """Below a budget's place on the axis: images, and their share; two where another was asked for."""
    used = found.used(budget)
    if used is None or not used.more:
        return f"{images:.0f}\n({share(budget)})"
    return f"{images:.0f}\n({100 * used.shares[0]:.3g} %,\nasked {share(budget)})"


def _levels(own: Statistics, budget: float) -> list[plots.Level]:
    known = [(name, own.mean_auc("baseline", name, budget)) for name in BASELINES]
    return [plots.Level(label=name, value=value) for name, value in known if value is not None]
