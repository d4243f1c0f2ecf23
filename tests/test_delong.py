"""DeLong's variance and test against published figures and against the definition over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score

from fastmoco.evaluate.delong import area_interval, areas_and_covariance, compare

# The 43 complete records of the ovarian cancer patients of DeLong, DeLong and Clarke-Pearson (1988), as SAS/STAT's
# documentation of PROC LOGISTIC lists them (example "Comparing Receiver Operating Characteristic Curves"): albumin,
# total protein, K-G score, and 0 for the 12 patients that the curves are to find.
ALBUMIN = """
    3.0 3.2 3.9 2.8 3.2 0.9 2.5 1.6 3.8 3.7 3.2 3.8 4.1 3.6 4.3 3.6 2.3 4.2 4.0 3.5 3.8 3.0
    4.5 3.7 3.1 4.1 4.3 4.3 3.2 2.6 3.3 1.7 3.7 3.3 4.2 3.5 2.9 2.1 2.8 4.0 3.3 3.7 3.6
"""
PROTEIN = """
    5.8 6.3 6.8 4.8 5.8 4.0 5.7 5.6 5.7 6.7 5.4 6.6 6.6 5.7 7.0 6.7 4.4 7.6 6.6 5.8 6.8 4.7
    7.4 7.4 6.6 8.2 7.0 6.5 5.1 4.7 6.8 4.0 6.1 6.3 7.7 6.2 5.7 4.8 6.2 7.0 5.7 6.9 6.6
"""
KG = "10 5 3 6 3 5 8 5 5 6 4 6 5 5 4 4 6 4 6 6 7 8 5 5 6 6 5 4 5 6 6 7 5 7 6 5 9 7 8 7 6 5 5"
BENEFIT = "0 1 1 0 1 0 0 1 1 1 1 1 1 1 1 0 1 0 0 1 1 0 1 1 1 1 1 1 1 1 0 0 1 1 1 1 0 1 0 1 1 1 1"


def table() -> tuple[np.ndarray, np.ndarray]:
    """(3, 43) scores, higher where surgery is of no use, and (43,) ones for those patients."""
    albumin, protein, kg = (np.array(text.split(), dtype=float) for text in (ALBUMIN, PROTEIN, KG))
    return np.stack([-albumin, kg, -protein]), 1 - np.array(BENEFIT.split(), dtype=int)


def test_published_areas_errors_and_intervals() -> None:
    scores, labels = table()
    assert labels.sum() == 12
    published = [(0.7366, 0.0927, 0.5549, 0.9182), (0.7258, 0.1028, 0.5243, 0.9273), (0.6478, 0.1000, 0.4518, 0.8439)]
    for score, figures in zip(scores, published, strict=True):
        assert area_interval(score, labels) == pytest.approx(figures, abs=5e-5)


def test_published_comparisons() -> None:
    scores, labels = table()
    # Against the K-G score: estimate, standard error, interval, chi-square, p.
    for number, figures in (
        (0, (0.0108, 0.0953, -0.1761, 0.1976, 0.0127, 0.9102)),
        (2, (-0.0780, 0.1046, -0.2830, 0.1271, 0.5554, 0.4561)),
    ):
        found = compare(scores[number], scores[1], labels)
        assert found.z is not None and found.p is not None
        line = (found.difference, found.error, found.low, found.high, found.z**2, found.p)
        assert line == pytest.approx(figures, abs=5e-5)
    # All three at once: chi-square with two degrees of freedom.
    areas, covariance = areas_and_covariance(scores, labels)
    contrast = np.array([[1.0, -1.0, 0.0], [0.0, -1.0, 1.0]])
    offset = contrast @ areas
    statistic = offset @ np.linalg.solve(contrast @ covariance @ contrast.T, offset)
    assert (statistic, chi2.sf(statistic, 2)) == pytest.approx((2.5340, 0.2817), abs=5e-5)


@pytest.mark.parametrize("digits", [1, 9])
def test_covariance_is_the_definitions_over_all_pairs(digits: int) -> None:
    rng = np.random.default_rng(digits)
    labels = np.r_[0, 0, 1, 1, rng.integers(0, 2, 37)]
    scores = np.round(rng.normal(size=(3, 41)) + 0.7 * labels, digits)
    areas, covariance = areas_and_covariance(scores, labels)
    up, down = scores[:, labels == 1], scores[:, labels == 0]
    won = np.array(
        [[[float(x > y) + 0.5 * float(x == y) for y in down[k]] for x in up[k]] for k in range(3)]
    )  # the kernel psi of the paper's equation 2
    of_up, of_down = won.mean(axis=2), won.mean(axis=1)
    expected = np.empty((3, 3))
    for r in range(3):
        for s in range(3):
            tens = ((of_up[r] - won[r].mean()) * (of_up[s] - won[s].mean())).sum() / (up.shape[1] - 1)
            ones = ((of_down[r] - won[r].mean()) * (of_down[s] - won[s].mean())).sum() / (down.shape[1] - 1)
            expected[r, s] = tens / up.shape[1] + ones / down.shape[1]
    np.testing.assert_allclose(covariance, expected, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(areas, [roc_auc_score(labels, score) for score in scores], rtol=1e-12)


def test_the_test_keeps_its_level_and_finds_a_difference() -> None:
    rng = np.random.default_rng(6)
    labels = np.repeat([0, 1], [60, 50])
    rejected, found = 0, 0
    for _ in range(400):
        shared = rng.normal(size=110) + 1.0 * labels
        first, second = shared + 0.6 * rng.normal(size=110), shared + 0.6 * rng.normal(size=110)
        p = compare(first, second, labels).p
        rejected += p is not None and p < 0.05
        better = compare(shared, shared + 3.0 * rng.normal(size=110), labels).p
        found += better is not None and better < 0.05
    # 20 are expected of 400: within four standard deviations.
    assert 4 <= rejected <= 38
    assert found > 300


def test_the_same_scores_have_no_test() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    scores = rng.normal(size=40) + labels
    # An increasing map leaves the order as it is.
    same = compare(scores, np.exp(scores), labels)
    assert (same.difference, same.error, same.z, same.p) == (0.0, 0.0, None, None) and same.note is not None
    assert compare(scores, -scores, labels).note is None


def test_too_few_images_and_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="two images of each class, not 1 and 3"):
        area_interval(np.arange(4.0), np.array([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="zeros and ones"):
        area_interval(np.arange(4.0), np.array([0, 2, 2, 0]))
    with pytest.raises(ValueError, match="finite"):
        area_interval(np.array([0.1, np.nan, 0.2, 0.3]), np.array([0, 1, 1, 0]))
    with pytest.raises(ValueError, match="do not fit"):
        areas_and_covariance(np.zeros((2, 5)), np.zeros(4))
