"""Scores of an encoder on training patients held out in turn: no test image has a part in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from fastmoco.evaluate.budgets import draw_budget
from fastmoco.evaluate.finetune import FinetuneConfig, finetune
from fastmoco.evaluate.probe import C_GRID, probe_probabilities
from fastmoco.evaluate.scores import auc
from fastmoco.models.encoder import Encoder
from fastmoco.study.work.context import Context

FOLDS = 5
Scores = dict[str, list[float]]
"""Of each kind of feature, or mode of fine-tuning, the AUC on each fold, mean of the label draws."""


def folds(context: Context) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of all images but the test's: those to train on and those held out, whole patients, five times."""
    known = np.sort(np.concatenate([context.splits.train, context.splits.validation]))
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, held in splitter.split(known, context.target.values[known], context.groups[known]):
        yield known[train], known[held]


def labelled(context: Context, budget: float) -> str:
    """How many labels a budget is, in words: of the folds' training images, in which one draw may differ by one."""
    values = context.target.values
    counts = [(len(draw_budget(values, train, budget, seed=0).indices), len(train)) for train, _ in folds(context)]
    used, every = (round(mean(column)) for column in zip(*counts, strict=True))
    return f"{used} labels ({used / every:.1%})" if budget < 1 else f"all {used}"


def known_features(context: Context, encoder: Encoder) -> dict[str, np.ndarray]:
    """Features (n, d) float32 by name of every image but the test's, whose rows are NaN."""
    known = np.concatenate([context.splits.train, context.splits.validation])
    sets = {}
    for name, values in context.images.select(known).features(encoder, device=context.device).items():
        sets[name] = np.full((len(context.target.values), values.shape[1]), np.nan, dtype=values.dtype)
        sets[name][known] = values
    return sets


def probe(context: Context, sets: Mapping[str, np.ndarray], budget: float, draws: int) -> Scores:
    """Logistic regression on each of `sets` (n, d). Its constant C is the one that is best over all folds and draws."""
    values, names = context.target.values, context.target.class_names
    found: dict[str, dict[float, list[list[float]]]] = {name: {c: [] for c in C_GRID} for name in sets}
    for train, held in folds(context):
        drawn = [draw_budget(values, train, budget, seed=draw).indices for draw in range(draws if budget < 1 else 1)]
        for name, features in sets.items():
            for c in C_GRID:
                scores = []
                for images in drawn:
                    said, _ = probe_probabilities(
                        features[images], values[images], features[held], c=c, classes=len(names)
                    )
                    scores.append(_auc(said, values[held], names))
                found[name][c].append(scores)
    best = {name: max(of_c.values(), key=lambda every: mean(map(mean, every))) for name, of_c in found.items()}
    return {name: [round(mean(scores), 4) for scores in every] for name, every in best.items()}


def tune(context: Context, encoder: Encoder, config: FinetuneConfig, budget: float, *, seed: int) -> list[float]:
    """The AUC of fine-tuning's best look at each fold, with the first draw of the labels."""
    found = []
    for train, held in folds(context):
        images = draw_budget(context.target.values, train, budget, seed=0).indices
        # The test images are none of this search's: a held-out one stands in for them.
        tuned = finetune(
            encoder,
            context.images,
            context.target,
            images,
            held,
            held[:1],
            config,
            seed=seed,
            device=context.device,
        )
        found.append(round(tuned.validation_score, 4))
    return found


def _auc(probabilities: np.ndarray, values: np.ndarray, names: list[str]) -> float:
    score, reasons = auc(probabilities, values, class_names=names)
    if score is None:
        raise ValueError(f"a fold has no AUC: {reasons[0]}")
    return score
