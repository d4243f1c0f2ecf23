"""Linear probes on frozen features at every label budget and draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastmoco.evaluate.budgets import draw_budget
from fastmoco.evaluate.numbers import finite
from fastmoco.evaluate.probe import choose_c, probe_probabilities
from fastmoco.study.cell import Cell
from fastmoco.study.cells import draw_seed, draws
from fastmoco.study.work.context import Context
from fastmoco.study.work.numbers import pack


def budget_row(context: Context, budget: float, seed: int, draw: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The labelled images of a draw, and what is to be said of them."""
    target, splits = context.target, context.splits
    drawn = draw_budget(target.values, splits.train, budget, seed=draw_seed(seed, draw), class_names=target.class_names)
    said = {"budget": budget, "seed": seed, "draw": draw, "images": len(drawn.indices), "used": drawn.used}
    return drawn.indices, said | {"note": drawn.note}


def probe_all(
    cell: Cell, context: Context, sets: Mapping[str, np.ndarray], seed: int, *, whole: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of probes {"features", "budget", "seed", "draw", "c", "validation_auc", "probabilities", "notes"} and of
    the budgets they had.

    A probe is fitted on the labelled images alone; its one constant C is chosen on the validation images. With
    `whole`, those that have all labels are fitted again with that C, on training and validation images together.
    """
    target, splits = context.target, context.splits
    classes = len(target.class_names)
    known = target.values
    probes, budgets = [], []
    for budget in cell.settings["budgets"]:
        for draw in draws(budget, cell.settings["draws"]):
            images, said = budget_row(context, budget, seed, draw)
            budgets.append(said)
            fitted = np.concatenate([images, splits.validation]) if whole and budget == 1 else images
            for name, features in sets.items():
                row: dict[str, Any] = {"features": name, "budget": budget, "seed": seed, "draw": draw}
                if not np.isfinite(features).all():
                    probes.append(row | {"notes": ["undefined: the features hold NaN or infinite values"]})
                    continue
                labelled, validation = features[images], features[splits.validation]
                choice = choose_c(labelled, known[images], validation, known[splits.validation], classes=classes)
                found, notes = probe_probabilities(
                    features[fitted], known[fitted], features[splits.test], c=choice.c, classes=classes
                )
                probes.append(
                    row
                    | {
                        "c": choice.c,
                        "validation_auc": finite(round(choice.validation_auc, 6)),
                        "probabilities": pack(found, target.kind),
                        "notes": sorted({*choice.notes, *notes}),
                    }
                )
    return probes, budgets
