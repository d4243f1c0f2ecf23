"""The pictures of one set of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmoco.evaluate.cka import PAPER_SIGMA, Alignments, Reuse
from fastmoco.evaluate.ks import columns, ks_distances
from fastmoco.study import plots
from fastmoco.study.report.blocks import Block, Heading, Picture, Table, Text
from fastmoco.study.report.gather import BASELINES, FULL, Findings, baseline_name
from fastmoco.study.report.statistics import Statistics, complete, stack
from fastmoco.study.report.words import number, share
from fastmoco.study.work.similarity import STAGES

_AUC = "test AUC"
KERNELS = {"linear": "linear", "rbf": "RBF, median distance", "paper": f"RBF, absolute {PAPER_SIGMA}"}


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
            ticks = {images[b]: f"{images[b]:.0f} ({share(b)})" for b in sorted(images)}
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
            figure = plots.probe_curves(
                STAGES, lines, _levels(own, budget), title=f"{found.data.name}: {share(budget)} of labels", score=_AUC
            )
            caption = (
                f"{found.data.name}: test AUC of linear probes by stage, {share(budget)} of the labels, mean of runs"
            )
            blocks.append(Picture(name=f"{found.data.name}-stages-{budget:g}", caption=caption, figure=figure))
    return blocks


def heat_maps(found: Findings) -> list[Block]:
    """CKA between the stages of two encoders, mean of seeds: pictures of linear CKA, and like stages by kernel."""
    each: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for record in found.of_kind("similarity"):
        for pair in record["result"]["pairs"]:
            if pair["a"] != pair["b"]:
                values = np.array([[np.nan if v is None else v for v in row] for row in pair["values"]])
                each.setdefault((pair["a"], pair["b"]), {}).setdefault(pair["kernel"], []).append(values)
    blocks: list[Block] = [Heading(level=3, text="How alike the encoders are")] if each else []
    rows: list[tuple[str, ...]] = []
    for (a, b), kernels in each.items():
        names = baseline_name(a), baseline_name(b)
        means = {kernel: np.mean(values, axis=0) for kernel, values in kernels.items()}
        figure = plots.cka_heat_map(
            Alignments(STAGES, STAGES, means["linear"]),
            title=f"{found.data.name}: {names[0]} and {names[1]}",
            rows=names[0],
            columns=names[1],
        )
        caption = f"{found.data.name}: linear CKA (unbiased) on test images, {names[0]} with {names[1]}, mean of seeds"
        blocks.append(Picture(name=f"{found.data.name}-cka-{a}-{b}", caption=caption, figure=figure))
        for kernel, mean in means.items():
            rows.append((f"{names[0]}, {names[1]}", KERNELS[kernel], *(number(float(v)) for v in np.diagonal(mean))))
    if rows:
        caption = f"{found.data.name}. CKA (unbiased) of like stages of two encoders by kernel, mean of seeds"
        blocks.append(Table(caption=caption, header=("encoders", "kernel", *STAGES), rows=tuple(rows)))
    return blocks


def reuse(found: Findings) -> list[Block]:
    """CKA of each stage before fine-tuning against after, all labels."""
    kept: dict[str, dict[str, list[dict[str, float]]]] = {}
    for record in found.of_kind("finetune"):
        for stage, row in record["result"].get("reuse", {}).items():
            if row["mean"] is not None:
                kept.setdefault(record["settings"]["init"], {}).setdefault(stage, []).append(row)
    if not kept:
        return []
    bars = {
        init: {
            stage: Reuse(
                mean=float(np.mean([row["mean"] for row in rows])),
                std=float(np.mean([row["std"] for row in rows])),
                draws=int(rows[0]["draws"]),
                size=int(rows[0]["size"]),
                images=int(rows[0]["images"]),
            )
            for stage, rows in stages.items()
        }
        for init in found.inits
        if (stages := kept.get(init))
    }
    one = next(iter(next(iter(bars.values())).values()))
    rows = tuple(
        (baseline_name(init), *(f"{v.mean:.3f} ({v.std:.3f})" for v in stages.values()))
        for init, stages in bars.items()
    )
    caption = (
        f"{found.data.name}: feature reuse, linear CKA (unbiased) before against after fine-tuning with all labels; "
        f"mean over seeds, and the deviation over {one.draws} draws of {one.size} of {one.images} test images"
    )
    return [
        Heading(level=3, text="Feature reuse"),
        Picture(
            name=f"{found.data.name}-reuse",
            caption=caption,
            figure=plots.reuse_bars(bars, title=f"{found.data.name}: feature reuse"),
        ),
        Table(caption=caption, header=("method", *STAGES), rows=rows),
    ]


def output_distances(own: Statistics) -> list[Block]:
    """KS distance of the outputs with few labels from those with all, and both distributions of a typical pair."""
    found = own.found
    truth = found.truth()
    rows: list[tuple[str, ...]] = []
    # One panel a method where one class says it all; otherwise one picture a method, with a panel a class.
    drawn: dict[str, list[plots.Outputs]] = {}
    smallest = [budget for budget in found.study.grid.budgets if budget < 1]
    for init in found.inits:
        full = found.runs(FULL, init, 1.0)
        cells = []
        for budget in smallest:
            few = found.runs(FULL, init, budget)
            both = {run[0] for run in complete(few)} & {run[0] for run in complete(full)}
            if not both:
                cells.append(number(None))
                continue
            a = stack(few, [run for run in complete(few) if run[0] in both])
            b = stack(full, [run for run in complete(full) if run[0] in both])
            distances = ks_distances(a, b, kind=truth.kind, class_names=truth.class_names)
            cells.append(number(distances.overall))
            if budget == min(smallest):
                seed, draw = distances.pair
                chosen = columns(truth.kind, len(truth.class_names))
                for name, column, mean in zip(distances.class_names, chosen, distances.mean, strict=True):
                    outputs = plots.Outputs(
                        title=baseline_name(init) if len(chosen) == 1 else name,
                        few=a[seed, draw, :, column],
                        full=b[seed, 0, :, column],
                        mean=float(mean),
                        method=init,
                    )
                    drawn.setdefault(f"class {name}" if len(chosen) == 1 else baseline_name(init), []).append(outputs)
        rows.append((baseline_name(init), *cells))
    if not drawn:
        return []
    said = f"{share(min(smallest))} of the labels against all"
    pictures = [
        Picture(
            name=f"{found.data.name}-ks-{place}",
            caption=f"{found.data.name}: outputs on test images, {who}, {said}; of each the run nearest to the mean",
            figure=plots.ks_curves(outputs, title=f"{found.data.name}, {who}: {said}"),
        )
        for place, (who, outputs) in enumerate(drawn.items(), start=1)
    ]
    caption = f"{found.data.name}. KS distance of the outputs from those with all labels (mean of runs and classes)"
    header = ("method", *(f"{share(budget)} of labels" for budget in smallest))
    return [
        Heading(level=3, text="How far few labels are from all"),
        Table(caption=caption, header=header, rows=tuple(rows)),
        *pictures,
    ]


def training(found: Findings) -> list[Block]:
    """What pretraining and fine-tuning did over time, of the first seed."""
    seed = found.study.grid.seeds[0]
    blocks: list[Block] = [Heading(level=3, text="Training curves")]
    panels: dict[str, list[plots.Line]] = {}
    for record in found.of_kind("pretrain"):
        if record["settings"]["seed"] != seed:
            continue
        rows = record["result"]["curve"]
        for name, title in (
            ("infonce", "InfoNCE"),
            ("top1", "key found first"),
            ("embedding_std", "spread (0: collapse)"),
        ):
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


def _levels(own: Statistics, budget: float) -> list[plots.Level]:
    known = [(name, own.mean_auc("baseline", name, budget)) for name in BASELINES]
    return [plots.Level(label=name, value=value) for name, value in known if value is not None]
