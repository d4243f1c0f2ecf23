"""CKA against its definitions written out, its invariances and closed forms."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from fastmoco.evaluate import cka as module
from fastmoco.evaluate.cka import PAPER_SIGMA, WHOLE, cka, cka_matrix, feature_reuse, unbiased_for

KERNELS = ("linear", "rbf", "paper")
ESTIMATORS = ("biased", "unbiased", "minibatch")


def pair(n: int, d1: int, d2: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two related sets of features with means far from 0."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d1))
    return a + 3.0, a @ rng.normal(size=(d1, d2)) + 0.5 * rng.normal(size=(n, d2)) - 2.0


def gram(features: np.ndarray, kernel: str, sigma: float = 1.0) -> np.ndarray:
    if kernel == "linear":
        return features @ features.T
    width = PAPER_SIGMA if kernel == "paper" else sigma * np.median(pdist(features))
    return np.exp(-cdist(features, features, "sqeuclidean") / (2 * width**2))


def u_statistic(k: np.ndarray, ell: np.ndarray) -> float:
    """Unbiased HSIC by its definition: the mean over ordered 4-tuples of different images (Song et al. 2012)."""
    total, count = 0.0, 0
    for i, j, q, r in permutations(range(len(k)), 4):
        total += k[i, j] * (ell[i, j] + ell[q, r] - 2 * ell[i, q])
        count += 1
    return total / count


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_set_is_1_to_itself_turned_moved_and_scaled(kernel, estimator) -> None:
    a, _ = pair(40, 6, 3)
    turned = a @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0] + 7.0
    if kernel != "paper":
        # The absolute width is the one that a scale is not invisible to.
        turned *= 0.01
    for other in (a, turned):
        assert cka(a, other, kernel=kernel, estimator=estimator, batch=10) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_orthogonal_maps_and_scales_change_nothing_between_two_sets(kernel, estimator) -> None:
    a, b = pair(40, 6, 5)
    a, b = a / 3, b / 6
    before = cka(a, b, kernel=kernel, estimator=estimator, batch=10)
    assert 0.05 < before < 0.99
    turned = b @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    assert cka(a, turned, kernel=kernel, estimator=estimator, batch=10) == pytest.approx(before, abs=1e-10)
    scaled = cka(a, 5.0 * b, kernel=kernel, estimator=estimator, batch=10)
    if kernel == "paper":
        assert abs(scaled - before) > 0.01
    else:
        assert scaled == pytest.approx(before, abs=1e-10)


def test_the_linear_kernel_is_the_form_in_features() -> None:
    a, b = pair(30, 7, 4)
    a0, b0 = a - a.mean(axis=0), b - b.mean(axis=0)
    wanted = np.linalg.norm(a0.T @ b0) ** 2 / (np.linalg.norm(a0.T @ a0) * np.linalg.norm(b0.T @ b0))
    assert cka(a, b) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_biased_is_hsic_with_the_centring_matrix(kernel) -> None:
    a, b = pair(25, 3, 4)
    centre = np.eye(25) - 1 / 25

    def hsic(k, ell):
        return np.trace(k @ centre @ ell @ centre)

    k, ell = gram(a, kernel, 0.7), gram(b, kernel, 0.7)
    wanted = hsic(k, ell) / math.sqrt(hsic(k, k) * hsic(ell, ell))
    assert cka(a, b, kernel=kernel, sigma=0.7) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_unbiased_is_the_mean_over_all_4_tuples(kernel) -> None:
    a, b = pair(9, 2, 3)
    k, ell = gram(a, kernel, 1.3), gram(b, kernel, 1.3)
    wanted = u_statistic(k, ell) / math.sqrt(u_statistic(k, k) * u_statistic(ell, ell))
    assert cka(a, b, kernel=kernel, sigma=1.3, estimator="unbiased") == pytest.approx(wanted, rel=1e-9)


def test_minibatches_of_all_images_are_the_unbiased_estimate_and_many_small_ones_come_to_it() -> None:
    a, b = pair(240, 6, 5, seed=2)
    for kernel in ("linear", "rbf"):
        whole = cka(a, b, kernel=kernel, estimator="unbiased")
        assert cka(a, b, kernel=kernel, estimator="minibatch", batch=240) == pytest.approx(whole, rel=1e-10)
        biased = cka(a, b, kernel=kernel)
        many = cka(a, b, kernel=kernel, estimator="minibatch", batch=8, passes=400)
        # Each minibatch is unbiased however small: the mean goes to the whole set's value, not to the biased one.
        assert abs(many - whole) < 0.003
        assert abs(cka(a[:8], b[:8], kernel=kernel) - whole) > 0.03 and abs(biased - whole) < 0.03


def test_minibatches_use_every_image_and_no_matrix_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = module._centred
    monkeypatch.setattr(module, "_centred", lambda g, u: (seen.append(len(g)), plain(g, u))[1])
    monkeypatch.setattr(module, "WHOLE", 10)
    a, b = pair(47, 3, 4)
    few = cka(a, b, estimator="minibatch", batch=10)
    # The set itself and the other: 47 images in four parts, twice.
    assert seen == [12, 12, 12, 12, 12, 12, 11, 11]
    monkeypatch.setattr(module, "WHOLE", 100)
    assert cka(a, b, estimator="minibatch", batch=10) == pytest.approx(few, rel=1e-12)


def test_large_sets_are_compared_in_minibatches() -> None:
    assert (unbiased_for(WHOLE), unbiased_for(WHOLE + 1)) == ("unbiased", "minibatch")


def test_the_median_of_many_images_is_that_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEDIAN_OF", 10)
    a, b = pair(30, 3, 4)
    k, ell = (np.exp(-cdist(x, x, "sqeuclidean") / (2 * np.median(pdist(x[::3])) ** 2)) for x in (a, b))
    centre = np.eye(30) - 1 / 30
    k, ell = centre @ k @ centre, centre @ ell @ centre
    wanted = (k * ell).sum() / (np.linalg.norm(k) * np.linalg.norm(ell))
    assert cka(a, b, kernel="rbf") == pytest.approx(wanted, rel=1e-10)


def test_unrelated_wide_sets_are_near_1_biased_and_near_0_unbiased() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 400)), rng.normal(size=(50, 400))
    assert cka(a, b) > 0.85
    for estimator in ("unbiased", "minibatch"):
        assert abs(cka(a, b, estimator=estimator)) < 0.05
    # The published absolute width makes the matrix an identity: everything equals everything.
    assert cka(a, b, kernel="paper") == pytest.approx(1.0, abs=1e-12)


def test_closed_forms() -> None:
    # Orthogonal, centred columns of one length, two of them in both: |A'B|^2 is 2, |A'A| sqrt(3), |B'B| sqrt(2).
    columns = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, 1]] * 2, dtype=float)
    columns[4:, 2] = -1
    a, b = columns[:, :3], columns[:, [0, 1]]
    assert cka(a, b) == pytest.approx(2 / math.sqrt(6), rel=1e-12)
    assert cka(columns[:, :2], columns[:, 2:3]) == pytest.approx(0.0, abs=1e-12)
    # One column against another is the square of Pearson's correlation.
    x, y = pair(60, 1, 1)
    assert cka(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2, rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_does_not_vary_or_is_not_finite_is_nan(kernel, estimator) -> None:
    a, _ = pair(20, 3, 2)
    bad = a.copy()
    bad[3, 1] = np.inf
    for other in (np.full((20, 4), 0.1, dtype=np.float32), bad):
        assert math.isnan(cka(a, other, kernel=kernel, estimator=estimator, batch=10))


def test_the_matrix_holds_every_pair_by_name() -> None:
    a, b = pair(30, 4, 5)
    c, _ = pair(30, 6, 2, seed=5)
    found = cka_matrix({"stage1": a, "stage2": c}, {"x": b, "y": a, "z": c}, kernel="rbf", estimator="unbiased")
    assert found.rows == ("stage1", "stage2") and found.columns == ("x", "y", "z")
    for i, first in enumerate((a, c)):
        for j, second in enumerate((b, a, c)):
            wanted = cka(first, second, kernel="rbf", estimator="unbiased")
            assert found.values[i, j] == pytest.approx(wanted, rel=1e-12)


def test_float32_features_are_computed_in_float64() -> None:
    a, b = pair(30, 4, 5)
    a, b = (a * 1e-3 + 100).astype(np.float32), b.astype(np.float32)
    assert cka(a, b) == pytest.approx(cka(a.astype(np.float64), b.astype(np.float64)), rel=1e-12)


def test_reuse_is_the_mean_and_deviation_of_the_drawn_values() -> None:
    a, b = pair(200, 5, 6)
    found = feature_reuse({"stage1": a, "stage4": a, "gone": a}, {"stage1": a, "stage4": b}, draws=7, size=50, seed=3)
    assert list(found) == ["stage1", "stage4"]
    assert found["stage1"].mean == pytest.approx(1.0) and found["stage1"].std < 1e-12
    rng = np.random.default_rng(3)
    values = []
    for _ in range(7):
        rows = rng.choice(200, 50, replace=False)
        values.append(cka(a[rows], b[rows], estimator="unbiased"))
    assert found["stage4"].mean == pytest.approx(np.mean(values), rel=1e-10)
    assert found["stage4"].std == pytest.approx(np.std(values, ddof=1), rel=1e-8)
    assert (found["stage4"].draws, found["stage4"].size, found["stage4"].images) == (7, 50, 200)


def test_with_few_images_a_draw_is_four_fifths_of_them() -> None:
    a, b = pair(60, 5, 6)
    found = feature_reuse({"s": a}, {"s": b}, draws=5)["s"]
    assert (found.size, found.images) == (48, 60)
    assert found.std > 0


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = pair(20, 3, 3)
    with pytest.raises(ValueError, match=r"\[19, 20\]"):
        cka(a, b[:19])
    with pytest.raises(ValueError, match="3 images are too few"):
        cka(a[:3], b[:3], estimator="unbiased")
    with pytest.raises(ValueError, match="minibatch of 3"):
        cka(a, b, estimator="minibatch", batch=3)
    with pytest.raises(ValueError, match="no kernel 'cosine'"):
        cka(a, b, kernel="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="standard deviation"):
        feature_reuse({"s": a}, {"s": b}, draws=1)
