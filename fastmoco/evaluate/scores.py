"""Scores of predicted probabilities, with an interval; an undefined score is None and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmoco.evaluate.intervals import replicates
from fastmoco.evaluate.weighted import (
    accuracies,
    aucs,
    average_precisions,
    calibration_errors,
    columns,
    f1s,
    macro,
    outcomes,
)

DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one set of predictions, each in [0, 1] or None where it is undefined.

    `auc`, `average_precision` and `f1` are those of class 1 for two classes; for more the means of one against the
    rest over the classes, for labels over the labels: `auc` and `average_precision` over those that have both
    outcomes, `f1` over those seen or predicted. `accuracy` is the share of images, for labels of (image, label)
    decisions, that are right. `calibration_error` is `weighted.calibration_errors`'s. `low` and `high` bound the
    AUC's 95 % interval. `notes` gives the reason for each None and names what was left out of a mean.
    """

    auc: float | None
    low: float | None
    high: float | None
    average_precision: float | None
    accuracy: float | None
    f1: float | None
    calibration_error: float | None
    notes: tuple[str, ...] = ()

    @classmethod
    def undefined(cls, reason: str) -> Scores:
        """No score at all, for one reason."""
        return cls(
            auc=None,
            low=None,
            high=None,
            average_precision=None,
            accuracy=None,
            f1=None,
            calibration_error=None,
            notes=(reason,),
        )


def score(
    probabilities: np.ndarray,
    values: np.ndarray,
    *,
    class_names: Sequence[str],
    groups: np.ndarray | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Scores:
    """Score (n, C) probabilities in [0, 1] against (n,) class numbers or (n, L) zeros and ones, as `weighted` does.

    `class_names` holds the C classes or L labels. `groups` (n,) says which images are redrawn together by the
    bootstrap of the AUC: their patients. None: each alone. `draws` 0 leaves the interval out. Raises ValueError for
    shapes that do not fit and for probabilities outside [0, 1].
    """
    _check(probabilities, values, class_names)
    if len(values) == 0:
        return Scores.undefined("no images to score")
    if not np.isfinite(probabilities).all():
        return Scores.undefined("the predictions hold NaN or infinite values")
    once = np.ones((len(values), 1))
    area = macro(aucs(probabilities, values, once))
    precision = macro(average_precisions(probabilities, values, once))
    f1_value, f1_notes = f1(probabilities, values, class_names=class_names)
    low = high = None
    notes = _without_both(values, class_names, what="AUC and average precision")
    if draws and not np.isnan(area[0]):
        found = replicates(probabilities[None, None], values, groups, "auc", draws=draws, seed=seed)
        low, high = found.low, found.high
        notes += found.notes
    return Scores(
        auc=_or_none(area[0]),
        low=low,
        high=high,
        average_precision=_or_none(precision[0]),
        accuracy=float(accuracies(probabilities, values, once)[0]),
        f1=f1_value,
        calibration_error=float(calibration_errors(probabilities, values, once)[0]),
        notes=(*notes, *f1_notes),
    )


def auc(probabilities: np.ndarray, values: np.ndarray, *, class_names: Sequence[str]) -> tuple[float | None, list[str]]:
    """Area under the ROC curve of (n, C) scores of any range, ties counted half, and what there is to say of it.

    Two classes: that of class 1. Otherwise the mean over the classes or labels with both outcomes, the others named.
    """
    _check(probabilities, values, class_names)
    value = macro(aucs(probabilities, values, np.ones((len(values), 1))))[0]
    return _or_none(value), _without_both(values, class_names, what="AUC")


def f1(probabilities: np.ndarray, values: np.ndarray, *, class_names: Sequence[str]) -> tuple[float | None, list[str]]:
    """F1 of the most probable class, or of each label above 0.5: of two classes class 1's, otherwise the mean over
    the classes or labels seen or predicted; and what there is to say of it."""
    _check(probabilities, values, class_names)
    by_column = f1s(probabilities, values, np.ones((len(values), 1)))[0]
    if np.isnan(by_column).all():
        what = "is of class 1" if values.ndim == 1 else "has any label"
        return None, [f"F1 undefined: no image {what}, in truth or by prediction"]
    missing = [name for name, value in zip(class_names, by_column, strict=False) if np.isnan(value)]
    # A class without an image is named with the AUC; a label predicted nowhere may well have a defined AUC.
    named = missing if values.ndim == 2 else []
    notes = [f"F1: left out are the labels neither there nor predicted: {', '.join(named)}"] if named else []
    return float(np.nanmean(by_column)), notes


def _check(probabilities: np.ndarray, values: np.ndarray, class_names: Sequence[str]) -> None:
    wide = (len(values), len(class_names))
    if probabilities.shape != wide or (values.ndim == 2 and values.shape != wide) or values.ndim > 2:
        raise ValueError(
            f"probabilities {probabilities.shape} and values {values.shape} do not fit each other and "
            f"{len(class_names)} class names"
        )


def _without_both(values: np.ndarray, class_names: Sequence[str], *, what: str) -> list[str]:
    """A sentence on the columns that have one outcome only, if there are any."""
    classes = len(class_names)
    count = outcomes(values, classes).sum(axis=0)
    wanted = columns(values, classes)
    missing = [class_names[c] for c, there in zip(wanted, count, strict=True) if there in (0, len(values))]
    if not missing or len(values) == 0:
        return []
    everything = len(missing) == len(wanted)
    if values.ndim == 2:
        named = ", ".join(
            f"{class_names[c]} ({'all' if there else 'none'})"
            for c, there in zip(wanted, count, strict=True)
            if there in (0, len(values))
        )
        if everything:
            return [f"{what} undefined: every label is on all of these images or on none: {named}"]
        return [f"{what}: left out are the labels on all of these images or on none: {named}"]
    if everything:
        seen = ", ".join(class_names[c] for c in np.unique(values))
        return [f"{what} undefined: every image is of class {seen}"]
    return [f"{what}: left out are the classes without an image here: {', '.join(missing)}"]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
