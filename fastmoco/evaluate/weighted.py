"""Scores of predictions under weights on the images: the one definition behind point estimates and resamples.

Every function takes probabilities (n, C) float in [0, 1] and values int64: (n,) class numbers for two or more
exclusive classes, whose probabilities sum to 1, or (n, L) zeros and ones for L labels, each with a probability of
its own (then C = L). `weights` (n, draws) float64 says how often each image counts in each draw: all ones for the
plain score, how often its patient was redrawn for a bootstrap; draws lie side by side, so that sums over images run
through all draws at once. Macro scores are returned by column: class 1 alone of
two classes (the other says the same), every class of more, every label. NaN: undefined under these weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Score = Literal["auc", "average_precision", "f1", "accuracy", "calibration_error"]
# Guo et al. 2017 ("On Calibration of Modern Neural Networks") use 15.
CALIBRATION_BINS = 15


def weighted_score(score: Score, probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,) of one score, macro scores averaged over the columns that have them; NaN where undefined.

    Raises ValueError for a name that is no score.
    """
    match score:
        case "auc":
            return macro(aucs(probabilities, values, weights))
        case "average_precision":
            return macro(average_precisions(probabilities, values, weights))
        case "f1":
            return macro(f1s(probabilities, values, weights))
        case "accuracy":
            return accuracies(probabilities, values, weights)
        case "calibration_error":
            return calibration_errors(probabilities, values, weights)
    raise ValueError(f"{score!r} is no score; there are {', '.join(get_args(Score))}")


def macro(by_column: np.ndarray) -> np.ndarray:
    """(draws,) means of (draws, columns) over the columns that are not NaN; NaN where all are."""
    defined = ~np.isnan(by_column)
    return _ratio(np.where(defined, by_column, 0.0).sum(axis=1), defined.sum(axis=1))


def columns(values: np.ndarray, classes: int) -> list[int]:
    """The columns that macro scores are averaged over."""
    return [1] if values.ndim == 1 and classes == 2 else list(range(classes))


def outcomes(values: np.ndarray, classes: int) -> np.ndarray:
    """(n, columns) bool: which image is of which of `columns`."""
    wanted = columns(values, classes)
    return values == 1 if values.ndim == 2 else values[:, None] == np.array(wanted)


def predictions(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Decisions shaped as `values`: the most probable class (the first of equals), or each label above 0.5."""
    return probabilities.argmax(axis=1) if values.ndim == 1 else (probabilities > 0.5).astype(np.int64)


def aucs(probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws, columns) areas under the ROC curve, one against the rest: the weighted share of pairs of a positive
    and a negative image that are in the right order, ties counted half. NaN without both outcomes."""
    positive = outcomes(values, probabilities.shape[1])
    result = np.empty((weights.shape[1], positive.shape[1]))
    for column, target in enumerate(columns(values, probabilities.shape[1])):
        up, down = _ordered(probabilities[:, target], positive[:, column], weights)
        # A positive beats the negatives of lower scores, and half of those of its own.
        twice = down.below[np.searchsorted(down.scores, up.scores, side="left")]
        twice += down.below[np.searchsorted(down.scores, up.scores, side="right")]
        result[:, column] = _ratio(0.5 * np.einsum("nr,nr->r", up.weights, twice), up.below[-1] * down.below[-1])
    return result


def average_precisions(probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws, columns) average precision: the sum over distinct scores, from the highest down, of the gain in
    recall times the precision at that threshold (scikit-learn's, without interpolation). NaN without both outcomes,
    as for the AUC, so that both are means over the same columns."""
    positive = outcomes(values, probabilities.shape[1])
    result = np.empty((weights.shape[1], positive.shape[1]))
    for column, target in enumerate(columns(values, probabilities.shape[1])):
        up, down = _ordered(probabilities[:, target], positive[:, column], weights)
        # What a threshold at each positive's own score finds, and what it takes in by mistake.
        found = up.below[-1] - up.below[np.searchsorted(up.scores, up.scores, side="left")]
        wrong = down.below[-1] - down.below[np.searchsorted(down.scores, up.scores, side="left")]
        precision = np.divide(found, found + wrong, out=np.zeros_like(found), where=found > 0)
        total = np.where(down.below[-1] > 0, up.below[-1], 0.0)
        result[:, column] = _ratio(np.einsum("nr,nr->r", up.weights, precision), total)
    return result


def f1s(probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws, columns) F1 of `predictions`: twice the hits over those true plus those predicted. NaN where there are
    neither."""
    classes = probabilities.shape[1]
    true = outcomes(values, classes)
    guessed = outcomes(predictions(probabilities, values), classes)
    involved = weights.T @ (true.astype(np.float64) + guessed)
    return _ratio(2 * (weights.T @ (true & guessed).astype(np.float64)), involved)


def accuracies(probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,) share of right `predictions`: of images, or of (image, label) decisions."""
    right = predictions(probabilities, values) == values
    share = right.astype(np.float64) if values.ndim == 1 else right.mean(axis=1)
    return share @ weights / weights.sum(axis=0)


def calibration_errors(probabilities: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,) expected calibration error over 15 bins of equal width, closed on the right (Guo et al. 2017).

    The mean over bins, by the share of predictions in them, of |share of right predictions - mean confidence|.
    Exclusive classes: one prediction an image, its confidence the largest probability. Labels: one prediction an
    image and label, its confidence the sigmoid, right where the label is 1; all of them in one set of bins.
    Raises ValueError for probabilities outside [0, 1].
    """
    if probabilities.min() < -1e-6 or probabilities.max() > 1 + 1e-6:
        raise ValueError("the calibration error needs probabilities between 0 and 1")
    if values.ndim == 1:
        confidence = probabilities.max(axis=1)[:, None]
        excess = (probabilities.argmax(axis=1) == values)[:, None] - confidence
    else:
        confidence, excess = probabilities, values - probabilities
    inner = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)[1:-1]
    place = np.searchsorted(inner, confidence, side="left")
    # Summed over the labels first: bins are weighted by the number of predictions, and every image makes as many.
    by_bin = np.zeros((len(values), CALIBRATION_BINS))
    np.add.at(by_bin, (np.arange(len(values))[:, None], place), excess)
    return np.abs(by_bin.T @ weights).sum(axis=0) / (weights.sum(axis=0) * confidence.shape[1])


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Images of one outcome by ascending score: `scores` (m,), `weights` (m, draws), and `below` (m + 1, draws), the
    weight of the first 0, 1, ... m of them."""

    scores: np.ndarray
    weights: np.ndarray
    below: np.ndarray


def _ordered(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[_Ordered, _Ordered]:
    """The positive and the negative images."""
    order = np.argsort(scores, kind="stable")
    found = []
    for chosen in (order[positive[order]], order[~positive[order]]):
        below = np.zeros((len(chosen) + 1, weights.shape[1]))
        weight = weights[chosen]
        np.cumsum(weight, axis=0, out=below[1:])
        found.append(_Ordered(scores[chosen], weight, below))
    return found[0], found[1]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
