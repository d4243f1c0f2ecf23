"""Intervals of methods, over patients, seeds and label draws, their paired differences and means over domains."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from fastmoco.evaluate.intervals import Estimate, interval, mean_over_domains, paired, replicates, run_weights
from fastmoco.evaluate.weighted import Score


def logistic(scores: np.ndarray) -> np.ndarray:
    """(..., n, 2) probabilities in the order of (..., n) scores."""
    one = 1 / (1 + np.exp(-scores))
    return np.stack([1 - one, one], axis=-1)


def method(rng: np.random.Generator, labels: np.ndarray, shape: tuple[int, int], *, signal: float = 1.0) -> np.ndarray:
    """(S, D, n, 2) predictions of runs that share part of their mistakes, those of a seed a larger part."""
    shared = rng.normal(size=len(labels)) + signal * labels
    of_seed = 0.5 * rng.normal(size=(shape[0], 1, len(labels)))
    return logistic(shared + of_seed + 0.5 * rng.normal(size=(*shape, len(labels))))


@pytest.mark.parametrize("score", ["auc", "average_precision", "accuracy", "calibration_error"])
def test_replicates_are_those_of_a_loop_over_patients_seeds_and_label_draws(score: Score) -> None:
    rng = np.random.default_rng(0)
    n, shape, draws = 37, (3, 2), 60
    labels = rng.integers(0, 2, n)
    groups = rng.integers(0, 9, n)
    probabilities = method(rng, labels, shape)
    found = replicates(probabilities, labels, groups, score, draws=draws, seed=3)
    scored = {
        "auc": lambda truth, p: roc_auc_score(truth, p[:, 1]),
        "average_precision": lambda truth, p: average_precision_score(truth, p[:, 1]),
        "accuracy": lambda truth, p: accuracy_score(truth, p.argmax(axis=1)),
        "calibration_error": lambda truth, p: by_bin(truth, p),
    }[score]
    each = np.array([[scored(labels, probabilities[s, d]) for d in range(2)] for s in range(3)])
    assert found.value == pytest.approx(each.mean(), abs=1e-12)
    np.testing.assert_allclose(found.seeds, each.mean(axis=1))
    # Patients come from one stream and runs from another.
    names, codes = np.unique(groups, return_inverse=True)
    patients, runs = np.random.default_rng(3), np.random.default_rng([3, 1])
    times = runs.multinomial(3, np.full(3, 1 / 3), size=draws)
    picked = runs.multinomial(2 * times, [0.5, 0.5])
    for k in range(draws):
        rows = np.repeat(np.arange(n), patients.multinomial(len(names), np.full(len(names), 1 / len(names)))[codes])
        total = sum(
            picked[k, s, d] * scored(labels[rows], probabilities[s, d, rows]) for s in range(3) for d in range(2)
        )
        assert picked[k].sum() == 6
        assert found.samples[k] == pytest.approx(total / 6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(found.samples, (2.5, 97.5))))


def by_bin(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error, bin by bin."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_redrawn_runs_are_nested_and_every_replicate_weighs_one() -> None:
    weights = run_weights((3, 7), 4000, seed=5)
    assert weights.shape == (4000, 3, 7)
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), 1.0)
    by_seed = weights.sum(axis=2)
    # Three of three with replacement: the weight of a seed has variance (1/3)(2/3)/3, and two seeds covariance -1/27.
    np.testing.assert_allclose(np.cov(by_seed.T), np.full((3, 3), -1 / 27) + np.eye(3) / 9, atol=0.006)
    # A seed that was not redrawn brings none of its label draws; one that was has them redrawn.
    assert ((weights > 0).any(axis=2) == (by_seed > 0)).all()
    alone = weights[np.isclose(by_seed[:, 0], 1 / 3), 0]
    assert len(np.unique(alone.round(6), axis=0)) > 100
    np.testing.assert_array_equal(run_weights((1, 1), 5, seed=0), np.ones((5, 1, 1)))


def test_more_label_draws_of_one_seed_do_not_shrink_the_interval_to_nothing() -> None:
    rng = np.random.default_rng(9)
    labels = rng.integers(0, 2, 90)
    one = method(rng, labels, (1, 1))
    alone = replicates(one, labels, None, "auc", draws=500)
    many = replicates(np.repeat(one, 50, axis=1), labels, None, "auc", draws=500)
    assert many.samples == pytest.approx(alone.samples, abs=1e-12) and many.value == pytest.approx(alone.value)


def test_paired_difference_is_narrower_than_that_of_two_test_sets() -> None:
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, 120)
    groups = np.arange(120) // 3
    base = rng.normal(size=120) + labels
    first = logistic(base + 0.3 * rng.normal(size=(3, 2, 120)))
    second = logistic(0.4 * labels + base + 0.3 * rng.normal(size=(3, 2, 120)))
    a = replicates(first, labels, groups, "auc", draws=1000)
    b = replicates(second, labels, groups, "auc", draws=1000)
    found = paired(b, a)
    assert a.value is not None and b.value is not None and found.value is not None
    assert found.value == pytest.approx(b.value - a.value, abs=1e-12) and found.value > 0
    np.testing.assert_allclose(found.samples, b.samples - a.samples, atol=1e-12)
    np.testing.assert_allclose(found.seeds, b.seeds - a.seeds, atol=1e-12)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    apart = replicates(second, labels, groups, "auc", draws=1000, seed=1).samples - a.samples
    low, high = np.percentile(apart, (2.5, 97.5))
    assert found.high - found.low < 0.6 * (high - low)
    assert found.p_above == (found.samples > 0).mean()
    assert found.share_above(found.value) == pytest.approx(0.5, abs=0.15)


def test_a_baseline_with_one_seed_is_compared_with_every_seed() -> None:
    rng = np.random.default_rng(10)
    labels = rng.integers(0, 2, 50)
    runs, baseline = method(rng, labels, (3, 2)), method(rng, labels, (1, 2))
    a = replicates(runs, labels, None, "auc", draws=200)
    b = replicates(baseline, labels, None, "auc", draws=200)
    repeated = replicates(np.repeat(baseline, 3, axis=0), labels, None, "auc", draws=200)
    np.testing.assert_allclose(paired(a, b).samples, paired(a, repeated).samples, atol=1e-12)
    assert paired(a, b).value == pytest.approx(paired(a, repeated).value)
    assert paired(b, a).seeds.shape == (3,)


def test_only_the_same_images_and_redraws_are_paired() -> None:
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 2, 40)
    runs = method(rng, labels, (2, 2))
    first = replicates(runs, labels, None, "auc", draws=50)
    other_labels = labels.copy()
    other_labels[0] = 1 - other_labels[0]
    others = [
        replicates(runs, other_labels, None, "auc", draws=50),
        replicates(runs, labels, np.arange(40) // 2, "auc", draws=50),
        replicates(runs, labels, None, "auc", draws=50, seed=1),
        replicates(runs, labels, None, "auc", draws=51),
    ]
    for other in others:
        with pytest.raises(ValueError, match="same images"):
            paired(first, other)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(first, replicates(method(rng, labels, (3, 2)), labels, None, "auc", draws=50))
    with pytest.raises(ValueError, match="same score"):
        paired(first, replicates(runs, labels, None, "accuracy", draws=50))


def estimate(samples: np.ndarray, value: float | None) -> Estimate:
    low, high, notes = interval(samples, alone=value is None)
    return Estimate(value=value, low=low, high=high, samples=samples, seeds=np.empty(0), notes=notes)


def test_mean_over_domains_takes_them_as_independent() -> None:
    rng = np.random.default_rng(13)
    # The very same replicates in every domain: taken one by one, their mean would be as wide as each.
    samples = 0.1 + rng.normal(size=5000)
    found = mean_over_domains([estimate(samples, 0.1)] * 4)
    assert found.value == pytest.approx(0.1)
    assert found.samples.std() == pytest.approx(samples.std() / 2, rel=0.05)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / 2, rel=0.06)
    assert found.seeds.shape == (0,)
    undefined = mean_over_domains([estimate(samples, 0.1), estimate(samples, None)])
    assert (undefined.value, undefined.low, undefined.p_above) == (None, None, None)
    assert "one patient" in undefined.notes[0]
    with pytest.raises(ValueError, match="as many replicates"):
        mean_over_domains([])
    with pytest.raises(ValueError, match="as many replicates"):
        mean_over_domains([estimate(samples, 0.1), estimate(samples[:9], 0.1)])


def test_labels_are_scored_in_every_replicate_by_those_that_are_defined() -> None:
    rng = np.random.default_rng(14)
    values = (rng.random((30, 3)) < 0.4).astype(np.int64)
    values[:, 2] = 0
    values[4, 2] = 1  # missing from a third of the replicates
    probabilities = rng.random((2, 1, 30, 3))
    found = replicates(probabilities, values, None, "auc", draws=40, seed=2)
    stream = np.random.default_rng(2)
    for k in range(40):
        rows = np.repeat(np.arange(30), stream.multinomial(30, np.full(30, 1 / 30)))
        kept = [c for c in range(3) if 0 < values[rows, c].sum() < 30]
        for s in range(2):
            expected = roc_auc_score(values[rows][:, kept], probabilities[s, 0][rows][:, kept], average="macro")
            assert found.by_run[k, s, 0] == pytest.approx(expected, abs=1e-12)
    assert found.notes == () and found.low is not None


def test_what_cannot_be_scored_is_refused_or_said() -> None:
    labels = np.zeros(8, dtype=np.int64)
    probabilities = np.full((2, 1, 8, 2), 0.5)
    nothing = replicates(probabilities, labels, None, "auc", draws=20)
    assert (nothing.value, nothing.low, nothing.p_above) == (None, None, None) and "undefined" in nothing.notes[0]
    difference = paired(nothing, nothing)
    assert difference.value is None and difference.low is None and difference.notes == nothing.notes
    with pytest.raises(ValueError, match="finite"):
        replicates(np.full((1, 1, 8, 2), np.nan), labels, None, "auc")
    with pytest.raises(ValueError, match="seeds, draws, images, classes"):
        replicates(probabilities[0], labels, None, "auc")
    with pytest.raises(ValueError, match="groups"):
        replicates(probabilities, labels, np.arange(7), "auc")
