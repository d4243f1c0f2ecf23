"""A frozen encoder looked at from all sides: linear probes, kNN, measures without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fastmoco.evaluate.features import stage_features
from fastmoco.evaluate.images import Images, views_device
from fastmoco.evaluate.knn import knn_probabilities
from fastmoco.evaluate.measures import alignment, effective_rank, rankme, tmi, uniformity
from fastmoco.evaluate.numbers import finite
from fastmoco.models.encoder import Encoder
from fastmoco.study.cell import Cell
from fastmoco.study.cells import pretraining_views
from fastmoco.study.work.context import Context
from fastmoco.study.work.encoders import load_start
from fastmoco.study.work.numbers import pack
from fastmoco.study.work.probing import probe_all

# Draws of the two views that alignment compares; no training sees these.
_VIEW_SEED = 71
_BATCH = 64


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"probes", "budgets", "knn": rows, "measures": {features: {name: value}}}.

    kNN has all labels. Measures are of the test images, which no encoder was trained on.
    """
    seed = cell.settings["seed"]
    encoder = load_start(context, cell.settings["init"], seed, needed)
    sets = context.images.features(encoder, device=context.device)
    probes, budgets = probe_all(cell, context, sets, seed)
    train, test = context.splits.train, context.splits.test
    known = context.target.values[train]
    classes = len(context.target.class_names)
    neighbours = [
        {
            "features": name,
            "probabilities": pack(
                knn_probabilities(values[train], known, values[test], classes=classes), context.target.kind
            ),
        }
        for name, values in sets.items()
        if np.isfinite(values).all()
    ]
    return {"probes": probes, "budgets": budgets, "knn": neighbours, "measures": _measures(context, encoder, sets)}


def _measures(context: Context, encoder: Encoder, sets: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    test = context.splits.test
    labels = context.target.values[test]
    pictures = context.images.select(test).on(views_device(context.device))
    first, second = (_of_views(context, encoder, pictures, number) for number in (1, 2))
    found: dict[str, dict[str, float | None]] = {}
    for name, features in sets.items():
        own = features[test]
        found[name] = {
            "rankme": finite(rankme(own)),
            "effective_rank": finite(effective_rank(own)),
            "alignment": finite(alignment(first[name], second[name])),
            "uniformity": finite(uniformity(own)),
            "tmi": finite(tmi(own, labels)),
        }
    return found


def _of_views(context: Context, encoder: Encoder, pictures: Images, number: int) -> dict[str, np.ndarray]:
    """Features of view `number` of each picture, drawn as in pretraining."""
    views = pretraining_views(context.study, context.data)

    def batches() -> Iterator[Tensor]:
        for part in np.array_split(np.arange(len(pictures)), max(1, len(pictures) // _BATCH)):
            yield pictures.views(part, views, seed=_VIEW_SEED, epoch=number)

    return stage_features(encoder, batches(), device=context.device)
