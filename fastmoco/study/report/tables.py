"""The tables of one set of images: what each method scored, and by how much they differ."""

from __future__ import annotations

from typing import Any

from fastmoco.evaluate.scores import auc
from fastmoco.evaluate.weighted import Score
from fastmoco.study.cells import RANDOM
from fastmoco.study.config import SCRATCH
from fastmoco.study.report.blocks import Block, Heading, Table, Text
from fastmoco.study.report.gather import BASELINES, BEST, FULL, LINEAR, Findings, baseline_name
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.report.words import NOT_KNOWN, number, points, scored, seeds, share
from fastmoco.study.work.numbers import unpack

SCORES: tuple[tuple[Score, str], ...] = (
    ("average_precision", "average precision"),
    ("f1", "F1"),
    ("accuracy", "accuracy"),
    ("calibration_error", "calibration error"),
)
MEASURES = {
    FULL: "Full fine-tuning: test AUC",
    LINEAR: "A linear layer alone, trained with augmentation: test AUC",
    "stage4": "Linear probe of stage 4: test AUC",
    BEST: "Linear probe of the stage that is best on the validation images: test AUC",
}


def describe(found: Findings) -> list[Block]:
    """What the images are."""
    described = found.described
    if described is None:
        return [Text(text="Nothing is known of these images yet: their first cell is missing.")]
    counts, patients = described["counts"], described["patients"]
    parts = [
        f"{part} {n} images" + (f" of {patients[part]} patients" if patients else "") for part, n in counts.items()
    ]
    target = described["targets"][found.data.label]
    classes = ", ".join(f"{n} of {name}" for name, n in target["counts"]["test"].items())
    text = (
        f"Target {found.data.label} ({target['kind']}); {', '.join(parts)}; test images by class: {classes}. Splits: "
        f"{described['origin']}. {found.data.size} px, {found.study.grid.arch}, recipe {found.data.recipe}."
    )
    return [Text(text=text)]


def score_tables(own: Statistics) -> list[Block]:
    """AUC by method and budget, a table for each way of measuring, baselines in all of them."""
    found, budgets = own.found, own.found.study.grid.budgets
    blocks: list[Block] = [Heading(level=3, text="Scores")]
    for measure, caption in MEASURES.items():
        if measure in (FULL, LINEAR) and measure not in found.study.finetuning.modes:
            continue
        inits = found.inits if measure == FULL else found.probed
        rows = [
            (baseline_name(init), *(scored(own.estimate(measure, init, budget)) for budget in budgets))
            for init in (*inits, *BASELINES)
        ]
        blocks.append(
            Table(caption=f"{found.data.name}. {caption}", header=("method", *map(_labels, budgets)), rows=tuple(rows))
        )
    blocks.append(_chosen_table(found))
    if FULL in found.study.finetuning.modes:
        blocks.append(_other_scores(own))
    return blocks


def difference_tables(own: Statistics) -> list[Block]:
    """Paired differences at every budget, with the spread over seeds."""
    found, budgets = own.found, own.found.study.grid.budgets
    blocks: list[Block] = [
        Heading(level=3, text="Paired differences"),
        Text(
            text="Points of AUC, on the same test images, seeds and labels; in brackets the 95 % interval, in the last "
            f"column the least and the greatest of the seeds' own means at {share(min(budgets))}."
        ),
    ]
    for measure in (FULL, "stage4", BEST):
        if measure == FULL and FULL not in found.study.finetuning.modes:
            continue
        rows = []
        for a, b in _pairs(found, measure):
            each = [own.difference(measure, a, b, budget) for budget in budgets]
            smallest = each[budgets.index(min(budgets))]
            rows.append((f"{baseline_name(a)} minus {baseline_name(b)}", *map(points, each), seeds(smallest)))
        blocks.append(
            Table(
                caption=f"{found.data.name}. {MEASURES[measure].split(':')[0]}: differences",
                header=("difference", *map(_labels, budgets), "seeds"),
                rows=tuple(rows),
            )
        )
    return blocks


def _pairs(found: Findings, measure: str) -> list[tuple[str, str]]:
    methods = found.study.pretrained
    pairs = [(method, "moco") for method in methods if method != "moco" and "moco" in methods]
    nothing = SCRATCH if measure == FULL else RANDOM
    others = [nothing, *BASELINES] if nothing in (*found.inits, *found.probed) else list(BASELINES)
    return pairs + [(method, other) for other in others for method in methods]


def _chosen_table(found: Findings) -> Table:
    rows = []
    for init in found.probed:
        cells = []
        for budget in found.study.grid.budgets:
            counts = found.chosen_stages(init, budget)
            cells.append(", ".join(f"{name} {n}" for name, n in counts.items()) or NOT_KNOWN)
        rows.append((baseline_name(init), *cells))
    header = ("method", *map(_labels, found.study.grid.budgets))
    caption = f"{found.data.name}. How often each stage was the best on the validation images"
    return Table(caption=caption, header=header, rows=tuple(rows))


def _other_scores(own: Statistics) -> Table:
    found = own.found
    rows = []
    for budget in found.study.grid.budgets:
        for init in (*found.inits, *BASELINES):
            cells = (scored(own.estimate(FULL, init, budget, score)) for score, _ in SCORES)
            rows.append((f"{baseline_name(init)}, {share(budget)}", *cells))
    header = ("method and labels", *(name for _, name in SCORES))
    return Table(caption=f"{found.data.name}. Full fine-tuning: other test scores", header=header, rows=tuple(rows))


def second_table(own: Statistics) -> list[Block]:
    """The second target of several labels, with the labels that no score counts."""
    found = own.found
    if not found.data.multilabel or found.described is None:
        return []
    truth = found.truth(second=True)
    score: tuple[tuple[Score, str], ...] = (("auc", "macro AUC"), *SCORES)
    rows = [(baseline_name(init), *(scored(own.second(init, name)) for name, _ in score)) for init in found.inits]
    flat = next((p for runs in found.second_runs.values() for p in runs.values()), None)
    notes = auc(flat, truth.values, class_names=truth.class_names)[1] if flat is not None else []
    caption = f"{found.data.name}. {len(truth.class_names)} labels at once, full fine-tuning, all labels"
    blocks: list[Block] = [
        Heading(level=3, text="The second target"),
        Table(caption=caption, header=("method", *(name for _, name in score)), rows=tuple(rows)),
    ]
    return blocks + [Text(text=f"{note[0].upper()}{note[1:]}.") for note in notes]


def neighbour_table(own: Statistics) -> Table:
    """kNN with all labels, by stage: means over seeds."""
    found = own.found
    truth = found.truth()
    by_init: dict[str, dict[str, list[float]]] = {}
    for record in found.of_kind("probes"):
        for row in record["result"]["knn"]:
            value, _ = auc(unpack(row["probabilities"]), truth.values, class_names=truth.class_names)
            if value is not None:
                by_init.setdefault(record["settings"]["init"], {}).setdefault(row["features"], []).append(value)
    return _by_stage(found, by_init, f"{found.data.name}. kNN (20 nearest, all labels): test AUC, mean of seeds", 3)


def measure_table(found: Findings) -> list[Block]:
    """Measures without labels or nearly, of stage 4 and of the head's embedding."""
    names = {
        "rankme": "RankMe",
        "effective_rank": "effective rank",
        "alignment": "alignment",
        "uniformity": "uniformity",
        "tmi": "TMI, nats",
    }
    blocks: list[Block] = []
    for features in ("stage4", "final"):
        rows = []
        for init in found.probed:
            values: dict[str, list[float]] = {}
            for record in found.of_kind("probes"):
                if record["settings"]["init"] == init:
                    for name, value in record["result"]["measures"].get(features, {}).items():
                        if value is not None:
                            values.setdefault(name, []).append(value)
            if values:
                rows.append((baseline_name(init), *(_mean(values.get(name, []), 2) for name in names)))
        if rows:
            said = "stage 4" if features == "stage4" else "the head's embedding"
            caption = f"{found.data.name}. Measures without labels (TMI: with), test images, {said}, mean of seeds"
            blocks.append(Table(caption=caption, header=("method", *names.values()), rows=tuple(rows)))
    return blocks


def _by_stage(found: Findings, values: dict[str, dict[str, list[float]]], caption: str, digits: int) -> Table:
    columns = ("stage1", "stage2", "stage3", "stage4", "final")
    rows = tuple(
        (baseline_name(init), *(_mean(values.get(init, {}).get(name, []), digits) for name in columns))
        for init in found.probed
    )
    return Table(caption=caption, header=("method", *columns), rows=rows)


def _mean(values: list[Any], digits: int) -> str:
    return number(sum(values) / len(values) if values else None, digits)


def _labels(budget: float) -> str:
    return f"{share(budget)} of labels"
