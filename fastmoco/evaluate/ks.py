"""KS distance: how far a model trained on few labels is from the one trained on all, by what they say of test images.

The two-sample Kolmogorov-Smirnov statistic is the greatest gap between two empirical distribution functions (Kaku et
al., NeurIPS 2021, compare the test set's output probabilities this way). 0: both models put out the same distribution;
1: all outputs of one lie above all of the other. It compares distributions, not images: two models may have distance 0
and disagree about every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from fastmoco.evaluate.targets import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class KsDistances:
    """KS distances by run and class.

    `values` is (S, D, classes) float64 in [0, 1]: pretraining seeds, label draws a seed, and the classes
    `class_names`. It is NaN where a run's probabilities are not finite. `pair` is the (seed, draw) to draw: the one
    whose mean over classes is nearest to the mean of all.
    """

    class_names: tuple[str, ...]
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(classes,): the mean over all seeds and draws."""
        return self.values.mean(axis=(0, 1))

    @property
    def overall(self) -> float:
        """The mean over seeds, draws and classes."""
        return float(self.values.mean())

    @property
    def pair(self) -> tuple[int, int]:
        """Seed and draw of the run whose mean over the classes is nearest to `overall`."""
        gap = np.abs(self.values.mean(axis=2) - self.overall)
        seed, draw = np.unravel_index(int(np.argmin(gap)), gap.shape)
        return int(seed), int(draw)


class Gap(NamedTuple):
    """Where two empirical distribution functions are furthest apart: their KS `distance`, the value `at` which it is,
    and the two shares, `low` and `high`, of values up to there."""

    distance: float
    at: float
    low: float
    high: float


def columns(kind: Kind, count: int) -> list[int]:
    """The columns of (n, count) probabilities to compare: of two classes, the second says it all."""
    return [1] if kind == "binary" else list(range(count))


def ks_distances(few: np.ndarray, full: np.ndarray, *, kind: Kind, class_names: Sequence[str]) -> KsDistances:
    """KS distances of the runs with few labels from those with all labels, class by class.

    `few` is (S, D, n, C): test probabilities of S pretraining seeds and D draws of labels a seed. `full` is
    (S, E, n, C): those of the runs with all labels, E a seed (often 1). Each few-label draw is compared with the
    all-label runs of its own pretraining seed; where there are several, their distances are averaged. Classes are
    class 1 where `kind` is binary, each class one by one where multiclass, each label where multilabel; `class_names`
    names the C columns. Raises ValueError where the shapes do not fit.
    """
    if few.ndim != 4 or full.ndim != 4 or len(few) != len(full) or few.shape[3] != full.shape[3]:
        raise ValueError(f"runs of (seeds, draws, images, classes) do not pair: {few.shape} and {full.shape}")
    if len(class_names) != few.shape[3]:
        raise ValueError(f"{len(class_names)} class names for {few.shape[3]} columns of probabilities")
    chosen = columns(kind, few.shape[3])
    values = np.empty((*few.shape[:2], full.shape[1], len(chosen)))
    for seed, draw, other in np.ndindex(values.shape[:3]):
        for place, column in enumerate(chosen):
            values[seed, draw, other, place] = _distance(few[seed, draw, :, column], full[seed, other, :, column])
    return KsDistances(class_names=tuple(class_names[c] for c in chosen), values=values.mean(axis=2))


def greatest_gap(first: np.ndarray, second: np.ndarray) -> Gap:
    """The greatest gap between the distribution functions of two samples, (n,) and (m,) finite values."""
    # The p-value is not used (the same images are in both samples), so the cheap one is asked for.
    found = ks_2samp(first, second, method="asymp")
    at = float(found.statistic_location)
    low, high = sorted(float(np.mean(values <= at)) for values in (first, second))
    return Gap(float(found.statistic), at, low, high)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    return greatest_gap(first, second).distance
