"""Intervals of one run against a bootstrap written out as a loop, scipy's, and a simulation with a known truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from fastmoco.evaluate import intervals
from fastmoco.evaluate.intervals import replicates


def one_run(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[float | None, float | None, tuple[str, ...]]:
    """The interval of the AUC of (n, C) predictions of a single run."""
    found = replicates(probabilities[None, None], labels, groups, "auc", draws=draws, seed=seed)
    return found.low, found.high, found.notes


@pytest.mark.parametrize("classes", [2, 3])
def test_interval_is_that_of_a_bootstrap_written_as_a_loop(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(classes)
    n, draws = 41, 70
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    groups = rng.choice(["p", "q", "r", "s", "t", "u", "v"], n)
    probabilities = np.round(rng.dirichlet(np.ones(classes), size=n), 1)
    # Blocks of 24 draws and a short last one; the draws themselves come from one stream all the same.
    monkeypatch.setattr(intervals, "_BLOCK", 24 * n)
    low, high, notes = one_run(probabilities, labels, groups=groups, seed=5, draws=draws)

    stream = np.random.default_rng(5)
    names, codes = np.unique(groups, return_inverse=True)
    values = []
    for _ in range(draws):
        times = stream.multinomial(len(names), np.full(len(names), 1 / len(names)))
        rows = np.repeat(np.arange(n), times[codes])
        each = [
            roc_auc_score(labels[rows] == c, probabilities[rows, c])
            for c in ([1] if classes == 2 else range(classes))
            if 0 < (labels[rows] == c).sum() < len(rows)
        ]
        values.append(np.mean(each))
    assert (low, high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=1e-12)
    assert notes == ()


def test_ten_copies_of_an_image_of_one_patient_add_no_certainty() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    positive = rng.random(60) + 0.4 * labels
    probabilities = np.stack([1 - positive, positive], axis=1)
    alone = one_run(probabilities, labels, seed=2, draws=300)
    patients = np.repeat(np.arange(60), 10)
    copies = np.repeat(probabilities, 10, axis=0), np.repeat(labels, 10)
    assert one_run(*copies, groups=patients, seed=2, draws=300)[:2] == pytest.approx(alone[:2])
    naive = one_run(*copies, seed=2, draws=300)
    assert naive[1] - naive[0] < 0.5 * (alone[1] - alone[0])


def test_interval_width_agrees_with_hanley_and_mcneil() -> None:
    rng = np.random.default_rng(8)
    labels = np.repeat([0, 1], [300, 200])
    positive = rng.normal(size=500) + 0.9 * labels
    probabilities = np.stack([-positive, positive], axis=1)
    area = roc_auc_score(labels, positive)
    low, high, _ = one_run(probabilities, labels)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + 199 * (q1 - area**2) + 299 * (q2 - area**2)) / (200 * 300)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.15)
    assert low < area < high


def test_interval_needs_two_patients_and_both_classes_in_most_draws() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    low, high, notes = one_run(probabilities, labels, groups=np.array(["x", "x", "x"]))
    assert low is None and high is None and "one patient" in notes[0]
    # One image of class 1 in 12 patients: a third of the resamples miss it, and that is said.
    labels = np.r_[1, np.zeros(11, dtype=np.int64)]
    probabilities = np.random.default_rng(0).random((12, 2))
    low, high, notes = one_run(probabilities, labels)
    assert low is not None and high is not None and "of 1000 resamples" in notes[0]


def test_interval_is_undefined_where_most_resamples_hold_one_class() -> None:
    probabilities = np.random.default_rng(0).random((12, 2))
    undefined = []
    for seed in range(8):
        # Two patients of one class each: about half of the resamples hold both.
        times = np.random.default_rng(seed).multinomial(2, [0.5, 0.5], size=100)
        lost = int((times != 1).any(axis=1).sum())
        low, high, notes = one_run(
            probabilities, np.repeat([0, 1], 6), groups=np.repeat(["x", "y"], 6), seed=seed, draws=100
        )
        undefined.append(lost > 50)
        assert (low is None) == (high is None) == (lost > 50)
        assert str(lost if lost > 50 else 100 - lost) in notes[0]
    assert 0 < sum(undefined) < 8


def test_one_run_is_scipys_percentile_bootstrap() -> None:
    rng = np.random.default_rng(12)
    labels = np.repeat([0, 1], [70, 60])
    scores = rng.normal(size=130) + labels

    def area(rows: np.ndarray) -> float:
        up, down = (scores[rows[labels[rows] == c]] for c in (1, 0))
        return float(scipy.stats.mannwhitneyu(up, down, method="asymptotic").statistic / (len(up) * len(down)))

    predictions = np.stack([-scores, scores], axis=1)[None, None]
    ours = replicates(predictions, labels, None, "auc", draws=4000, seed=1)
    theirs = scipy.stats.bootstrap(
        (np.arange(130),), area, method="percentile", vectorized=False, n_resamples=1000, rng=np.random.default_rng(2)
    )
    deviation = float(theirs.standard_error)
    # The 2.5th percentile of 1000 normal replicates has a standard error of 0.084 deviations, of 4000 half of that.
    interval = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=0.3 * deviation)
    assert ours.samples.std() == pytest.approx(deviation, rel=0.1)


def test_patients_redrawn_cover_and_images_redrawn_do_not() -> None:
    """Binormal scores with a patient's share: a patient's 10 images are of one class and of one deviation.

    The true area is that of a random image of either class: Phi(1 / sqrt(2 (1 + 0.5))).
    """
    rng = np.random.default_rng(4)
    truth = float(scipy.stats.norm.cdf(1.0 / np.sqrt(2 * 1.5)))
    patients = np.repeat(np.arange(40), 10)
    covered = {"patients": 0, "images": 0}
    trials = 100
    for trial in range(trials):
        labels = np.repeat([0, 1], 20)[patients]
        scores = labels + rng.normal(size=40)[patients] + np.sqrt(0.5) * rng.normal(size=400)
        for name, groups in (("patients", patients), ("images", None)):
            low, high, _ = one_run(np.stack([-scores, scores], axis=1), labels, groups=groups, seed=trial, draws=200)
            assert low is not None and high is not None
            covered[name] += low <= truth <= high
    # 95 of 100, with a standard deviation of 2.2; the percentile method on 40 patients falls a little short.
    assert covered["patients"] >= 88
    assert covered["images"] < 75
