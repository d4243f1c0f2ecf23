"""The linear probe: its solution, its choice of C, and odd inputs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastmoco.evaluate import probe
from fastmoco.evaluate.probe import C_GRID, choose_c, probe_probabilities

Problem = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def problem(seed: int, *, n: int = 91, d: int = 13, classes: int = 2, signal: float = 1.0) -> Problem:
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(classes, d))
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    scales = 10.0 ** rng.uniform(-3, 3, d)
    features = (signal * directions[labels] / np.sqrt(d) + rng.normal(size=(n, d))) * scales + scales
    half = n // 2
    features = features.astype(np.float32)
    return features[:half], labels[:half], features[half:], labels[half:]


@pytest.mark.parametrize(("classes", "c"), [(2, 0.01), (2, 100.0), (3, 1.0)])
def test_probe_is_standardised_logistic_regression(classes: int, c: float) -> None:
    train, labels, test, _ = problem(1, classes=classes)
    found, notes = probe_probabilities(train, labels, test, c=c, classes=classes)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=100_000, tol=1e-10))
    oracle.fit(train.astype(np.float64), labels)
    assert notes == ()
    np.testing.assert_allclose(found, oracle.predict_proba(test.astype(np.float64)), atol=2e-3)


def test_probe_is_exact_where_the_default_tolerance_is_not() -> None:
    train, labels, test, _ = problem(5, n=121, d=60, signal=0.5)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=100_000, tol=1e-10))
    exact = oracle.fit(train.astype(np.float64), labels).predict_proba(test.astype(np.float64))
    found, _ = probe_probabilities(train, labels, test, c=100.0, classes=2)
    np.testing.assert_allclose(found, exact, atol=5e-3)


def test_c_is_the_grids_best_on_validation_and_the_smallest_of_equals() -> None:
    picked = set()
    for seed in range(12):
        train, labels, other, answers = problem(seed, d=31, signal=1.5)
        choice = choose_c(train, labels, other, answers, classes=2)
        tried = {
            c: roc_auc_score(answers, probe_probabilities(train, labels, other, c=c, classes=2)[0][:, 1])
            for c in C_GRID
        }
        best = max(tried.values())
        assert choice.validation_auc == pytest.approx(best, abs=1e-12)
        assert choice.c == min(c for c, value in tried.items() if value > best - 1e-12)
        picked.add(choice.c)
    assert len(picked) > 1
    # Perfectly separable: every C is right, so the most regularised is kept.
    labels = np.arange(40) % 2
    features = np.stack([labels * 2.0 - 1.0, np.zeros(40)], axis=1)
    assert choose_c(features, labels, features, labels, classes=2).c == C_GRID[0]


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    train, labels, test, _ = problem(2)
    plain, _ = probe_probabilities(train, labels, test, c=1.0, classes=2)
    factor = 2.0 ** np.arange(-6, 7)  # powers of two, so that float32 loses nothing
    scaled, _ = probe_probabilities(train * factor, labels, test * factor, c=1.0, classes=2)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_a_constant_feature_changes_nothing_even_where_test_images_differ_in_it(constant: float) -> None:
    train, labels, test, answers = problem(3)
    plain, _ = probe_probabilities(train, labels, test, c=1.0, classes=2)
    wider = np.c_[train, np.full(len(train), constant, dtype=np.float32)]
    shifted = np.c_[test, np.full(len(test), constant + 5.0, dtype=np.float32)]
    found, _ = probe_probabilities(wider, labels, shifted, c=1.0, classes=2)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    choice = choose_c(wider, labels, shifted, answers, classes=2)
    assert choice.c == choose_c(train, labels, test, answers, classes=2).c


def test_rounding_noise_of_a_constant_feature_is_not_a_feature() -> None:
    train, labels, test, _ = problem(9)
    plain, _ = probe_probabilities(train, labels, test, c=1.0, classes=2)
    # Off by one in the last place wherever the label is 1: standardised, it would give every answer away.
    low = np.float32(0.7)
    noisy = np.c_[train, np.where(labels == 1, np.nextafter(low, np.float32(1)), low)]
    found, _ = probe_probabilities(noisy, labels, np.c_[test, np.full(len(test), low)], c=1.0, classes=2)
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_only_constant_features_give_the_prior_and_an_auc_of_one_half() -> None:
    labels = np.array([0, 0, 0, 1] * 5)
    features = np.full((20, 3), 0.7, dtype=np.float32)
    found, notes = probe_probabilities(features, labels, features, c=1.0, classes=2)
    np.testing.assert_allclose(found[:, 1], 0.25, atol=1e-4)
    choice = choose_c(features, labels, features, labels, classes=2)
    assert choice.validation_auc == 0.5 and choice.c == C_GRID[0] and notes == ()


def test_a_class_without_training_images_has_probability_zero() -> None:
    train, labels, test, _ = problem(4, classes=2)
    renamed = np.where(labels == 1, 3, 0)
    found, _ = probe_probabilities(train, renamed, test, c=1.0, classes=4)
    plain, _ = probe_probabilities(train, labels, test, c=1.0, classes=2)
    assert found.shape == (len(test), 4) and not found[:, 1:3].any()
    np.testing.assert_allclose(found[:, [0, 3]], plain, atol=1e-12)


def test_wide_separable_features_converge_at_the_largest_c() -> None:
    # More features than images, all directions separable: the slowest case for the solver.
    train, labels, test, _ = problem(5, n=121, d=200, signal=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, notes = probe_probabilities(train, labels, test, c=C_GRID[-1], classes=2)
    assert notes == ()
    assert np.isfinite(found).all()


def test_a_probe_that_never_converges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, answers = problem(6, n=121, d=60, signal=0.5)
    monkeypatch.setattr(probe, "_MOST_ITERATIONS", 1)
    _, notes = probe_probabilities(train, labels, test, c=100.0, classes=2)
    assert notes == ("the probe at C 100 stopped after 1 iterations without converging",)
    assert "without converging" in choose_c(train, labels, test, answers, classes=2).notes[0]


def test_the_same_bits_every_time() -> None:
    train, labels, test, answers = problem(7, classes=3)
    first = choose_c(train, labels, test, answers, classes=3)
    assert choose_c(train, labels, test, answers, classes=3) == first
    runs = [probe_probabilities(train, labels, test, c=first.c, classes=3)[0] for _ in range(2)]
    np.testing.assert_array_equal(*runs)


def test_validation_of_one_class_chooses_nothing() -> None:
    train, labels, other, _ = problem(8)
    with pytest.raises(ValueError, match="no C can be chosen"):
        choose_c(train, labels, other, np.zeros(len(other), dtype=np.int64), classes=2)
