"""How alike representations and outputs are: CKA between encoders, feature reuse, and KS distance."""

from __future__ import annotations

from typing import get_args

import numpy as np

from fastmoco.evaluate.cka import Alignments, Kernel, Reuse, kernel_words
from fastmoco.evaluate.heat_map import cka_heat_map
from fastmoco.evaluate.ks import KsDistances, columns, ks_distances
from fastmoco.study import plots
from fastmoco.study.report.blocks import Block, Heading, Listing, Picture, Table
from fastmoco.study.report.entries import lacking
from fastmoco.study.report.gather import FULL, Findings
from fastmoco.study.report.statistics import Statistics, complete, stack
from fastmoco.study.report.words import NOT_KNOWN, Footnotes, number
from fastmoco.study.work.similarity import STAGES

KERNELS = {kernel: kernel_words(kernel) for kernel in get_args(Kernel)}
# The absolute width leaves next to nothing to be seen: a row of the table says so.
_DRAWN = ("linear", "rbf")


def heat_maps(found: Findings) -> list[Block]:
    """CKA between the stages of two encoders, mean of seeds: pictures by kernel, and like stages as a table."""
    each: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for record in found.of_kind("similarity"):
        for pair in record["result"]["pairs"]:
            if pair["a"] != pair["b"]:
                values = np.array([[np.nan if v is None else v for v in row] for row in pair["values"]])
                each.setdefault((pair["a"], pair["b"]), {}).setdefault(pair["kernel"], []).append(values)
    blocks: list[Block] = [Heading(level=3, text="How alike the encoders are")] if each else []
    rows: list[tuple[str, ...]] = []
    footnotes = Footnotes()
    for (a, b), kernels in each.items():
        names = plots.label_of(a), plots.label_of(b)
        means = {kernel: np.mean(values, axis=0) for kernel, values in kernels.items()}
        for kernel in _DRAWN:
            figure = cka_heat_map(
                Alignments(STAGES, STAGES, means[kernel]),
                title=f"{found.data.name}: {names[0]} and {names[1]}\n{KERNELS[kernel]}",
                rows=names[0],
                columns=names[1],
            )
            said = f"CKA (unbiased, {KERNELS[kernel]}) on test images, {names[0]} with {names[1]}, mean of seeds"
            name = f"{found.data.name}-cka-{kernel}-{a}-{b}"
            blocks.append(Picture(name=name, caption=f"{found.data.name}: {said}", figure=figure))
        for kernel, mean in means.items():
            diagonal = [number(None if np.isnan(v) else float(v)) for v in np.diagonal(mean)]
            some = footnotes.seeds(len(kernels[kernel]), len(found.study.grid.seeds))
            rows.append((footnotes.mark(f"{names[0]}, {names[1]}", some), KERNELS[kernel], *diagonal))
    if rows:
        caption = f"{found.data.name}. CKA (unbiased) of like stages of two encoders by kernel, mean of seeds"
        header = ("encoders", "kernel", *STAGES)
        blocks.append(Table(caption=caption, header=header, rows=tuple(rows), notes=footnotes.lines))
    return blocks


def reuse(found: Findings) -> list[Block]:
    """CKA of each stage before fine-tuning against after, all labels, by kernel."""
    kept: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    lost: dict[str, list[str]] = {}
    for record in found.of_kind("finetune"):
        init = record["settings"]["init"]
        lost.setdefault(init, []).extend(record["result"].get("notes", []))
        for kernel, stages in record["result"].get("reuse", {}).items():
            for stage, row in stages.items():
                if row["mean"] is not None:
                    kept.setdefault((kernel, init, stage), []).append(row)
    if not kept:
        items = tuple(f"{plots.label_of(init)}: {note}" for init, notes in lost.items() for note in notes)
        return [Heading(level=3, text="Feature reuse"), Listing(items=items)] if items else []
    means = {key: _mean_reuse(rows) for key, rows in kept.items()}
    kernels = [kernel for kernel in KERNELS if any(key[0] == kernel for key in means)]
    footnotes, wanted = Footnotes(), len(found.study.grid.seeds)
    bars: dict[str, dict[str, dict[str, Reuse]]] = {KERNELS[kernel]: {} for kernel in kernels}
    table = []
    for init in found.inits:
        known = any(key[1] == init for key in means)
        for kernel in kernels if known or lost.get(init) else ():
            own = {stage: means[kernel, init, stage] for stage in STAGES if (kernel, init, stage) in means}
            if own:
                bars[KERNELS[kernel]][init] = own
            cells = []
            for stage in STAGES:
                shown = f"{own[stage].mean:.3f} ({own[stage].std:.3f})" if stage in own else NOT_KNOWN
                seeds = len(kept.get((kernel, init, stage), []))
                cells.append(footnotes.mark(shown, footnotes.seeds(seeds, wanted)))
            table.append((footnotes.mark(plots.label_of(init), lost[init]), KERNELS[kernel], *cells))
    one = next(iter(means.values()))
    caption = (
        f"{found.data.name}: feature reuse, CKA (unbiased) before against after fine-tuning with all labels, by "
        f"kernel; mean over seeds, and the deviation over {one.draws} draws of {one.size} of {one.images} test images"
    )
    figure = plots.reuse_bars(bars, title=f"{found.data.name}: feature reuse")
    header = ("method", "kernel", *STAGES)
    return [
        Heading(level=3, text="Feature reuse"),
        Picture(name=f"{found.data.name}-reuse", caption=caption, figure=figure),
        Table(caption=caption, header=header, rows=tuple(table), notes=footnotes.lines),
    ]


def _mean_reuse(rows: list[dict[str, float]]) -> Reuse:
    """Of several seeds, one row each."""
    return Reuse(
        mean=float(np.mean([row["mean"] for row in rows])),
        std=float(np.mean([row["std"] for row in rows])),
        draws=int(rows[0]["draws"]),
        size=int(rows[0]["size"]),
        images=int(rows[0]["images"]),
    )


def output_distances(own: Statistics) -> list[Block]:
    """KS distance of the outputs with few labels from those with all, by class, and both distributions of a typical
    pair."""
    found = own.found
    truth = found.truth()
    chosen = columns(truth.kind, len(truth.class_names))
    names = [truth.class_names[column] for column in chosen]
    rows: list[tuple[str, ...]] = []
    footnotes = Footnotes()
    # One panel a method where one class says it all; otherwise one picture a method, with a panel a class.
    drawn: dict[str, list[plots.Outputs]] = {}
    smallest = [budget for budget in found.study.grid.budgets if budget < 1]
    for budget in smallest:
        for init in found.inits:
            paired = _paired(own, init, budget)
            title = f"{plots.label_of(init)}, {found.asked(budget)}"
            if paired is None:
                rows.append((title, *[number(None)] * (1 + len(chosen) * (len(chosen) > 1))))
                continue
            few, full = paired
            distances = ks_distances(few, full, kind=truth.kind, class_names=truth.class_names)
            planned, there = found.planned(FULL, budget), (few.shape[0], few.shape[1])
            said = [] if there == planned else [f"provisional: {lacking(there, planned)}"]
            mean = footnotes.mark(number(distances.overall), said)
            rows.append((title, mean, *([number(float(v)) for v in distances.mean] if len(chosen) > 1 else [])))
            if budget == min(smallest):
                outputs = _outputs(init, few, full, distances, chosen)
                drawn.setdefault(f"class {names[0]}" if len(chosen) == 1 else plots.label_of(init), []).extend(outputs)
    if all(row[1] == NOT_KNOWN for row in rows):
        return []
    said_of = f"{found.asked(min(smallest))} of the labels against all"
    pictures = [
        Picture(
            name=f"{found.data.name}-ks-{place}",
            caption=f"{found.data.name}: outputs on test images, {who}, {said_of}; of each the run nearest to the mean",
            figure=plots.ks_curves(outputs, title=f"{found.data.name}, {who}:\n{said_of}"),
        )
        for place, (who, outputs) in enumerate(drawn.items(), start=1)
    ]
    # Of two classes one says it all.
    header = (f"class {names[0]}",) if len(chosen) == 1 else ("mean of classes", *names)
    table = Table(
        caption=f"{found.data.name}. KS distance of the outputs from those with all labels, mean of runs",
        header=("method and labels", *header),
        rows=tuple(rows),
        notes=footnotes.lines,
    )
    return [Heading(level=3, text="How far few labels are from all"), table, *pictures]


def _paired(own: Statistics, init: str, budget: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Outputs (S, D, n, C) with few labels and (S, 1, n, C) with all, of the seeds that have both."""
    few, full = own.found.runs(FULL, init, budget), own.found.runs(FULL, init, 1.0)
    seeds = {run[0] for run in complete(few)} & {run[0] for run in complete(full)}
    if not seeds:
        return None
    first, second = ([run for run in complete(runs) if run[0] in seeds] for runs in (few, full))
    return stack(few, first), stack(full, second)


def _outputs(
    init: str, few: np.ndarray, full: np.ndarray, distances: KsDistances, chosen: list[int]
) -> list[plots.Outputs]:
    """The run nearest to the mean, class by class."""
    seed, draw = distances.pair
    return [
        plots.Outputs(
            title=plots.label_of(init) if len(chosen) == 1 else name,
            few=few[seed, draw, :, column],
            full=full[seed, 0, :, column],
            mean=float(mean),
            method=init,
        )
        for name, column, mean in zip(distances.class_names, chosen, distances.mean, strict=True)
    ]
