"""Scores of predicted class probabilities, with intervals; an undefined score is None and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
# Weights (draws x images) at a time: enough to keep numpy busy, few enough to stay near the caches.
_BLOCK = 1_000_000
INTERVAL = "percentile bootstrap, 95 %, patients redrawn with replacement (images where patients are unknown)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one set of predictions, each in [0, 1] or None where it is undefined.

    `auc` is that of class 1 for two classes, otherwise the mean of the one-vs-rest AUCs over the classes that
    have both outcomes. `f1` is that of class 1, or the mean over the classes seen or predicted. `low` and
    `high` bound the AUC's 95 % interval. `notes` gives the reason for each None and names the classes left
    out of a mean.
    """

    auc: float | None
    low: float | None
    high: float | None
    accuracy: float | None
    f1: float | None
    notes: tuple[str, ...] = ()

    @classmethod
    def undefined(cls, reason: str) -> Scores:
        """No score at all, for one reason."""
        return cls(auc=None, low=None, high=None, accuracy=None, f1=None, notes=(reason,))


def score(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    groups: np.ndarray | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Scores:
    """Score (n, classes) probabilities against (n,) class numbers.

    `groups` (n,) says which images are redrawn together by the bootstrap: their patients. None: each alone.
    """
    if len(labels) == 0:
        return Scores.undefined("no images to score")
    if not np.isfinite(probabilities).all():
        return Scores.undefined("the predictions hold NaN or infinite values")
    notes: list[str] = []
    value, reasons = auc(probabilities, labels, class_names=class_names)
    notes += reasons
    low = high = None
    if value is not None:
        low, high, reasons = auc_interval(probabilities, labels, groups=groups, seed=seed, draws=draws)
        notes += reasons
    predicted = probabilities.argmax(axis=1)
    f1_value, reasons = f1(predicted, labels, classes=len(class_names))
    notes += reasons
    return Scores(
        auc=value,
        low=low,
        high=high,
        accuracy=float((predicted == labels).mean()),
        f1=f1_value,
        notes=tuple(notes),
    )


def auc(probabilities: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str]) -> tuple[float | None, list[str]]:
    """Area under the ROC curve of (n, classes) probabilities, ties counted half, and what there is to say of
    it.

    Two classes: that of class 1. More: the mean one-vs-rest AUC over the classes with both outcomes.
    """
    targets = _targets(len(class_names))
    values = _class_aucs(probabilities, labels, np.ones((1, len(labels))), targets)[0]
    missing = [class_names[c] for c, value in zip(targets, values, strict=True) if np.isnan(value)]
    if len(missing) == len(targets):
        seen = ", ".join(class_names[c] for c in np.unique(labels))
        return None, [f"AUC undefined: every image is of class {seen}"]
    reasons = [f"AUC leaves out the classes without an image here: {', '.join(missing)}"] if missing else []
    return float(np.nanmean(values)), reasons


def auc_interval(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float | None, float | None, list[str]]:
    """2.5th and 97.5th percentile of `auc` over `draws` resamples of the groups, and remarks on them.

    Each resample is scored as the whole set is: a resample without any defined AUC is left out, and counted.
    """
    codes = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(codes.max()) + 1
    if count < 2:
        return None, None, ["interval undefined: one patient or image, so there is nothing to redraw"]
    rng = np.random.default_rng(seed)
    targets = _targets(probabilities.shape[1])
    values = np.empty(draws)
    block = max(1, _BLOCK // len(labels))
    for start in range(0, draws, block):
        here = min(block, draws - start)
        times = rng.multinomial(count, np.full(count, 1.0 / count), size=here)
        aucs = _class_aucs(probabilities, labels, times[:, codes].astype(np.float64), targets)
        defined = ~np.isnan(aucs)
        total = np.where(defined, aucs, 0.0).sum(axis=1)
        values[start : start + here] = np.divide(
            total, defined.sum(axis=1), out=np.full(here, np.nan), where=defined.any(axis=1)
        )
    kept = values[~np.isnan(values)]
    lost = draws - len(kept)
    if lost > draws / 2:
        return None, None, [f"interval undefined: {lost} of {draws} resamples held one class only"]
    reasons = [f"interval over {len(kept)} of {draws} resamples; the rest held one class only"] if lost else []
    low, high = np.percentile(kept, (2.5, 97.5))
    return float(low), float(high), reasons


def f1(predicted: np.ndarray, labels: np.ndarray, *, classes: int) -> tuple[float | None, list[str]]:
    """F1 of (n,) class numbers: class 1's of two classes, else the mean over those seen or predicted."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    involved = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    targets = [c for c in _targets(classes) if involved[c] > 0]
    if not targets:
        return None, ["F1 undefined: no image is of class 1 and none is predicted to be"]
    return float(np.mean([2 * hits[c] / involved[c] for c in targets])), []


def _targets(classes: int) -> list[int]:
    """The classes whose one-vs-rest scores are averaged: of two, the second says it all."""
    return [1] if classes == 2 else list(range(classes))


def _class_aucs(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, targets: Sequence[int]
) -> np.ndarray:
    """(draws, targets) float64 one-vs-rest AUCs with (draws, n) weights on images; NaN: undefined."""
    result = np.empty((len(weights), len(targets)))
    for column, target in enumerate(targets):
        order = np.argsort(probabilities[:, target], kind="stable")
        ordered = probabilities[order, target]
        # Images with equal scores form a run; a positive beats the negatives of lower runs, and half of its
        # own's.
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        positive = labels[order] == target
        weight = weights[:, order]
        up = np.add.reduceat(weight * positive, starts, axis=1)
        down = np.add.reduceat(weight * ~positive, starts, axis=1)
        below = np.cumsum(down, axis=1) - 0.5 * down
        pairs = up.sum(axis=1) * down.sum(axis=1)
        result[:, column] = np.divide(
            (up * below).sum(axis=1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0
        )
    return result
