"""DeLong's variance of areas under ROC curves, and the test of two curves on the same images.

DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), 837-845, computed by midranks as Sun and Xu, IEEE Signal
Processing Letters 21 (2014), 1389-1393, do: ties count half. The images are taken to be independent. Where a patient
has several, and for means over seeds and label draws, `intervals` is what holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

_LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference of two areas, `first` minus `second`, and its test.

    `error` is the standard error of `difference`; `low` and `high` bound its 95 % interval (normal approximation), `z`
    is `difference` / `error`, `p` two-sided. Where `error` is 0 there is no test: `z` and `p` are None, and `note` says
    so.
    """

    first: float
    second: float
    difference: float
    error: float
    low: float
    high: float
    z: float | None
    p: float | None
    note: str | None = None


def areas_and_covariance(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas (k,) of the k curves of (k, n) scores against (n,) zeros and ones, and their covariance (k, k); float64.

    Raises ValueError for other shapes or labels, scores that are not finite, and fewer than two images of a class,
    where there is no variance.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[1:]:
        raise ValueError(f"scores (curves, images) {scores.shape} and labels {labels.shape} do not fit each other")
    if not np.isfinite(scores).all() or not np.isin(labels, (0, 1)).all():
        raise ValueError("scores must be finite and labels zeros and ones")
    positive = labels == 1
    up, down = int(positive.sum()), int((~positive).sum())
    if min(up, down) < 2:
        raise ValueError(f"DeLong's variance needs two images of each class, not {up} and {down}")
    rank = rankdata(scores, axis=1)
    # An image's rank among all less that among its own class counts the images of the other class below it.
    wins = (rank[:, positive] - rankdata(scores[:, positive], axis=1)) / down
    losses = (rank[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / up
    covariance = np.atleast_2d(np.cov(wins)) / up + np.atleast_2d(np.cov(losses)) / down
    return wins.mean(axis=1), covariance


def area_interval(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, float, float]:
    """Area, standard error, and lower and upper end of the 95 % interval (normal approximation, cut to [0, 1]) of (n,)
    scores against (n,) zeros and ones. Raises ValueError as `areas_and_covariance` does."""
    areas, covariance = areas_and_covariance(np.asarray(scores)[None], labels)
    area, error = float(areas[0]), float(np.sqrt(covariance[0, 0]))
    reach = float(norm.ppf(0.5 + _LEVEL / 2)) * error
    return area, error, max(0.0, area - reach), min(1.0, area + reach)


def compare(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> Comparison:
    """Test whether two sets of (n,) scores of the same n images have the same area against (n,) zeros and ones.

    Raises ValueError as `areas_and_covariance` does.
    """
    areas, covariance = areas_and_covariance(np.stack([first, second]), labels)
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    # The terms are of the size of the areas' own variances; what is below their rounding is 0.
    error = float(np.sqrt(variance)) if variance > 1e-14 * float(np.trace(covariance)) else 0.0
    reach = float(norm.ppf(0.5 + _LEVEL / 2)) * error
    z = difference / error if error else None
    return Comparison(
        first=float(areas[0]),
        second=float(areas[1]),
        difference=difference,
        error=error,
        low=difference - reach,
        high=difference + reach,
        z=z,
        p=None if z is None else float(2 * norm.sf(abs(z))),
        note=None if error else "no test: both sets of scores order the images alike, or without a mistake",
    )
