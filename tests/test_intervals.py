"""Intervals against a bootstrap written out as a loop, scipy's, and simulations with a known truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from fastmoco.evaluate import intervals
from fastmoco.evaluate.intervals import Estimate, interval, mean_over_domains, paired, replicates, run_weights
from fastmoco.evaluate.weighted import Score


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


def test_one_run_is_scipys_percentile_bootstrap() -> None:
    rng = np.random.default_rng(12)
    labels = np.repeat([0, 1], [70, 60])
    probabilities = method(rng, labels, (1, 1))

    def area(rows: np.ndarray) -> float:
        up, down = (probabilities[0, 0, rows[labels[rows] == c], 1] for c in (1, 0))
        return float(scipy.stats.mannwhitneyu(up, down, method="asymptotic").statistic / (len(up) * len(down)))

    ours = replicates(probabilities, labels, None, "auc", draws=4000, seed=1)
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
            low, high, _ = one_run(logistic(scores), labels, groups=groups, seed=trial, draws=200)
            assert low is not None and high is not None
            covered[name] += low <= truth <= high
    # 95 of 100, with a standard deviation of 2.2; the percentile method on 40 patients falls a little short.
    assert covered["patients"] >= 88
    assert covered["images"] < 75


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
