"""Weighted nearest-neighbour classification by cosine similarity (Wu et al., CVPR 2018)."""

from __future__ import annotations

import numpy as np

from fastmoco.data.patients import patient_groups
from fastmoco.evaluate.scores import auc

NEIGHBOURS = 20
TEMPERATURE = 0.07
_CHUNK_BYTES = 64 << 20


def knn_probabilities(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    exclude_groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Class probabilities (m, classes) float64 of (m, d) queries from their k nearest of the (n, d) bank.

    Neighbour i votes for its class `labels[i]` with weight exp(cosine similarity / temperature); the votes
    are divided by their sum. `k` is capped at n. `exclude_groups` holds the group of every bank row (n,) and
    of every query (m,): a neighbour of the query's own group has no vote. A row is NaN where no neighbour is
    left.
    """
    directions, wanted = _unit(bank), _unit(queries)
    k = min(k, len(bank))
    votes = np.eye(classes)[labels]
    result = np.empty((len(queries), classes))
    chunk = max(1, _CHUNK_BYTES // (4 * len(bank)))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = wanted[part] @ directions.T
        if exclude_groups is not None:
            similarity[exclude_groups[1][part, None] == exclude_groups[0][None, :]] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        # exp(-inf) is 0: the excluded, taken where fewer than k others are left, have no vote.
        weights = np.exp(near / temperature)
        counted = np.einsum("mk,mkc->mc", weights, votes[nearest])
        total = weights.sum(axis=1, keepdims=True)
        result[part] = np.divide(counted, total, out=np.full_like(counted, np.nan), where=total > 0)
    return result


def monitor(features: np.ndarray, labels: np.ndarray, patients: np.ndarray | None) -> dict[str, float | None]:
    """Leave-one-out kNN "accuracy" and "auc" of (n, d) features, to watch a pretraining run by.

    Each image is classified by the others, those of its own patient excluded where `patients` (n,) is given.
    The AUC is as in `scores.auc`. A score is None where it is undefined: the features hold NaN or infinite
    values, all images are of one patient or, for the AUC, of one class.
    """
    groups = patient_groups(patients, len(labels))
    if not np.isfinite(features).all() or len(np.unique(groups)) < 2:
        return {"accuracy": None, "auc": None}
    classes = max(2, int(labels.max()) + 1)
    probabilities = knn_probabilities(features, labels, features, classes=classes, exclude_groups=(groups, groups))
    value, _ = auc(probabilities, labels, class_names=[str(c) for c in range(classes)])
    return {"accuracy": float((probabilities.argmax(axis=1) == labels).mean()), "auc": value}


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float32; a zero row stays zero, and is equally far from all."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0).astype(np.float32)
