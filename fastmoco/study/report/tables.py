"""The tables of one set of images: what each method scored, and by how much they differ."""

from __future__ import annotations

import numpy as np

from fastmoco.evaluate.scores import auc
from fastmoco.evaluate.weighted import Score
from fastmoco.study.cells import RANDOM
from fastmoco.study.config import SCRATCH
from fastmoco.study.plots import label_of
from fastmoco.study.report.blocks import Block, Heading, Table, Text
from fastmoco.study.report.entries import RUNS, Entries
from fastmoco.study.report.gather import BASELINES, BEST, FULL, LINEAR, Findings, Truth
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.report.words import NOT_KNOWN, Footnotes, seeds
from fastmoco.study.work.numbers import unpack
from fastmoco.study.work.similarity import STAGES

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
    blocks += _left_out(found.truth())
    for measure, inits in measured(found).items():
        entries = Entries()
        rows = [
            (
                label_of(init),
                *(entries.score(own, measure, init, budget) for budget in budgets),
                entries.runs(own, measure, (init,), budgets),
            )
            for init in (*inits, *BASELINES)
        ]
        blocks.append(
            Table(
                caption=f"{found.data.name}. {MEASURES[measure]}",
                header=("method", *_labels(found), RUNS),
                rows=tuple(rows),
                notes=entries.footnotes.lines,
            )
        )
    blocks.append(_chosen_table(found))
    if FULL in found.study.finetuning.modes:
        blocks.append(_other_scores(own))
    return blocks


def measured(found: Findings) -> dict[str, tuple[str, ...]]:
    """The ways of measuring that the study has, each with the starts that it is done for."""
    probes = {"stage4": found.probed, BEST: found.probed}
    modes = {FULL: found.inits, LINEAR: found.linear}
    return {mode: inits for mode, inits in modes.items() if mode in found.study.finetuning.modes} | probes


def difference_tables(own: Statistics) -> list[Block]:
    """Paired differences at every budget, with the spread over seeds."""
    found, budgets = own.found, own.found.study.grid.budgets
    blocks: list[Block] = [
        Heading(level=3, text="Paired differences"),
        Text(
            text="Points of AUC, on the same test images, seeds and labels; in brackets the 95 % interval; in the last "
            "column but one the least and the greatest of the seeds' own means at "
            f"{found.asked(min(budgets))} of the labels."
        ),
    ]
    for measure in measured(found):
        pairs = _pairs(found, measure)
        if measure == LINEAR or not pairs:
            continue
        entries, rows = Entries(), []
        for a, b in pairs:
            rows.append(
                (
                    f"{label_of(a)} minus {label_of(b)}",
                    *(entries.difference(own, measure, a, b, budget) for budget in budgets),
                    seeds(own.difference(measure, a, b, min(budgets))),
                    entries.runs(own, measure, (a, b), budgets),
                )
            )
        blocks.append(
            Table(
                caption=f"{found.data.name}. {MEASURES[measure].split(':')[0]}: differences",
                header=("difference", *_labels(found), "seeds", RUNS),
                rows=tuple(rows),
                notes=entries.footnotes.lines,
            )
        )
    return blocks


def trained_pairs(found: Findings) -> list[tuple[str, str]]:
    """Variants and MoCo, and each method and scratch where the study has it: what full fine-tuning compares."""
    return [(a, b) for a, b in _pairs(found, FULL) if b not in BASELINES]


def _pairs(found: Findings, measure: str) -> list[tuple[str, str]]:
    """Variants and MoCo; and each method and what needs no pretraining, where the study has it."""
    methods, starts = found.study.pretrained, measured(found)[measure]
    pairs = [(method, "moco") for method in methods if method != "moco" and "moco" in methods]
    others = [*(init for init in (SCRATCH, RANDOM) if init in starts), *BASELINES]
    return pairs + [(method, other) for other in others for method in methods]


def _chosen_table(found: Findings) -> Table:
    rows = []
    for init in found.probed:
        cells = []
        for budget in found.study.grid.budgets:
            counts = found.chosen_stages(init, budget)
            cells.append(", ".join(f"{name} {n}" for name, n in counts.items()) or NOT_KNOWN)
        rows.append((label_of(init), *cells))
    header = ("method", *_labels(found))
    caption = f"{found.data.name}. How often each stage was the best on the validation images"
    return Table(caption=caption, header=header, rows=tuple(rows))


def _other_scores(own: Statistics) -> Table:
    found, entries = own.found, Entries()
    rows = []
    for budget in found.study.grid.budgets:
        for init in (*found.inits, *BASELINES):
            cells = (entries.score(own, FULL, init, budget, score) for score, _ in SCORES)
            rows.append((f"{label_of(init)}, {found.asked(budget)}", *cells))
    return Table(
        caption=f"{found.data.name}. Full fine-tuning: other test scores",
        header=("method and labels", *(name for _, name in SCORES)),
        rows=tuple(rows),
        notes=entries.footnotes.lines,
    )


def second_table(own: Statistics) -> list[Block]:
    """The second target of several labels, with the labels that no score counts, and paired differences."""
    found = own.found
    if not found.data.multilabel or FULL not in found.study.finetuning.modes:
        return []
    truth = found.truth(second=True)
    score: tuple[tuple[Score, str], ...] = (("auc", "macro AUC"), *SCORES)
    header = tuple(name for _, name in score)
    caption = f"{found.data.name}. {len(truth.class_names)} labels at once, full fine-tuning, all labels"
    scores, differences = Entries(), Entries()
    rows = [(label_of(init), *(scores.second(own, init, name) for name, _ in score)) for init in found.inits]
    apart = [
        (f"{label_of(a)} minus {label_of(b)}", *(differences.second_difference(own, a, b, name) for name, _ in score))
        for a, b in trained_pairs(found)
    ]
    blocks: list[Block] = [
        Heading(level=3, text="The second target"),
        Table(caption=caption, header=("method", *header), rows=tuple(rows), notes=scores.footnotes.lines),
    ]
    if apart:
        blocks.append(
            Table(
                caption=f"{caption}: paired differences, points",
                header=("difference", *header),
                rows=tuple(apart),
                notes=differences.footnotes.lines,
            )
        )
    return blocks + _left_out(truth)


def _left_out(truth: Truth) -> list[Block]:
    """The classes or labels that macro scores leave out, which are the same whatever is predicted."""
    nothing = np.zeros((len(truth.values), len(truth.class_names)))
    notes = auc(nothing, truth.values, class_names=truth.class_names)[1]
    return [Text(text=f"{note[0].upper()}{note[1:]}.") for note in notes]


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
    columns, footnotes = (*STAGES, "final"), Footnotes()
    wanted = len(found.study.grid.seeds)
    rows = [
        (label_of(init), *(footnotes.mean(by_init.get(init, {}).get(name, []), wanted) for name in columns))
        for init in found.probed
    ]
    caption = f"{found.data.name}. kNN (20 nearest, all labels): test AUC, mean of seeds"
    return Table(caption=caption, header=("method", *columns), rows=tuple(rows), notes=footnotes.lines)


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
        rows, footnotes = [], Footnotes()
        for init in found.probed:
            values: dict[str, list[float]] = {}
            for record in found.of_kind("probes"):
                if record["settings"]["init"] == init:
                    for name, value in record["result"]["measures"].get(features, {}).items():
                        if value is not None:
                            values.setdefault(name, []).append(value)
            if values:
                wanted = len(found.study.grid.seeds)
                each = (footnotes.mean(values.get(name, []), wanted, digits=2) for name in names)
                rows.append((label_of(init), *each))
        if rows:
            said = "stage 4" if features == "stage4" else "the head's embedding"
            caption = f"{found.data.name}. Measures without labels (TMI: with), test images, {said}, mean of seeds"
            header = ("method", *names.values())
            blocks.append(Table(caption=caption, header=header, rows=tuple(rows), notes=footnotes.lines))
    return blocks


def _labels(found: Findings) -> tuple[str, ...]:
    """A heading for each budget."""
    return tuple(f"{found.asked(budget)} of labels" for budget in found.study.grid.budgets)
