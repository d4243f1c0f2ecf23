"""AUC, F1 and intervals against scikit-learn and against a bootstrap written out as a loop."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from fastmoco.evaluate import scores
from fastmoco.evaluate.scores import auc, auc_interval, f1, score

NAMES = ["a", "b", "c", "d"]


def simplex(rng: np.random.Generator, n: int, classes: int) -> np.ndarray:
    return rng.dirichlet(np.ones(classes), size=n)


@pytest.mark.parametrize("seed", range(20))
def test_binary_auc_is_sklearns_with_and_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, 53)]
    positive = rng.random(55) + 0.3 * labels
    if seed % 2:
        positive = np.round(positive, 1)  # about a dozen distinct values over 55 images
    probabilities = np.stack([-positive, positive], axis=1)
    value, notes = auc(probabilities, labels, class_names=NAMES[:2])
    assert value == pytest.approx(roc_auc_score(labels, positive), abs=1e-12)
    assert notes == []


def test_all_scores_equal_is_an_auc_of_one_half() -> None:
    labels = np.array([0, 1, 1, 0, 0])
    assert auc(np.full((5, 2), 0.5), labels, class_names=NAMES[:2])[0] == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_multiclass_auc_is_sklearns_macro_one_vs_rest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(4), rng.integers(0, 4, 63)]
    probabilities = simplex(rng, 67, 4)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert auc(probabilities, labels, class_names=NAMES)[0] == pytest.approx(expected, abs=1e-12)


def test_absent_class_is_left_out_of_the_mean_and_named() -> None:
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 3], 61)
    probabilities = simplex(rng, 61, 4)
    value, notes = auc(probabilities, labels, class_names=NAMES)
    each = [roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 1, 3)]
    assert value == pytest.approx(np.mean(each), abs=1e-12)
    assert len(notes) == 1 and notes[0].endswith(": c")


@pytest.mark.parametrize("classes", [2, 4])
def test_one_class_has_no_auc_and_says_why(classes: int) -> None:
    rng = np.random.default_rng(0)
    found = score(simplex(rng, 9, classes), np.ones(9, dtype=np.int64), class_names=NAMES[:classes])
    assert found.auc is None and found.low is None and found.high is None
    assert found.accuracy is not None
    assert any("every image is of class b" in note for note in found.notes)


def test_f1_without_a_positive_anywhere_is_undefined_but_without_a_hit_is_zero() -> None:
    nobody = np.zeros(5, dtype=np.int64)
    value, notes = f1(nobody, nobody, classes=2)
    assert value is None and "F1 undefined" in notes[0]
    assert f1(nobody, np.array([0, 0, 1, 0, 1]), classes=2)[0] == 0.0


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_accuracy_and_f1_are_sklearns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    # The last class is never true, as happens to rare ones.
    labels = np.r_[0, 1, rng.integers(0, max(2, classes - 1), 45)]
    probabilities = simplex(rng, 47, classes)
    predicted = probabilities.argmax(axis=1)
    found = score(probabilities, labels, class_names=NAMES[:classes], draws=10)
    average = "binary" if classes == 2 else "macro"
    assert found.f1 == pytest.approx(f1_score(labels, predicted, average=average), abs=1e-12)
    assert found.accuracy == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_predictions_are_undefined_not_zero(bad: float) -> None:
    probabilities = np.full((4, 2), 0.5)
    probabilities[2, 1] = bad
    found = score(probabilities, np.array([0, 1, 0, 1]), class_names=NAMES[:2])
    assert (found.auc, found.low, found.high, found.accuracy, found.f1) == (None,) * 5
    assert "NaN or infinite" in found.notes[0]


def test_no_images_are_undefined() -> None:
    found = score(np.empty((0, 2)), np.empty(0, dtype=np.int64), class_names=NAMES[:2])
    assert found.auc is None and found.notes == ("no images to score",)


@pytest.mark.parametrize("classes", [2, 3])
def test_interval_is_that_of_a_bootstrap_written_as_a_loop(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(classes)
    n, draws = 41, 70
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    groups = rng.choice(["p", "q", "r", "s", "t", "u", "v"], n)
    probabilities = np.round(simplex(rng, n, classes), 1)
    # Blocks of 24 draws and a short last one; the draws themselves come from one stream all the same.
    monkeypatch.setattr(scores, "_BLOCK", 24 * n)
    low, high, notes = auc_interval(probabilities, labels, groups=groups, seed=5, draws=draws)

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
    assert notes == []


def test_ten_copies_of_an_image_of_one_patient_add_no_certainty() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    positive = rng.random(60) + 0.4 * labels
    probabilities = np.stack([1 - positive, positive], axis=1)
    alone = auc_interval(probabilities, labels, seed=2, draws=300)
    patients = np.repeat(np.arange(60), 10)
    copies = np.repeat(probabilities, 10, axis=0), np.repeat(labels, 10)
    assert auc_interval(*copies, groups=patients, seed=2, draws=300)[:2] == pytest.approx(alone[:2])
    naive = auc_interval(*copies, seed=2, draws=300)
    assert naive[1] - naive[0] < 0.5 * (alone[1] - alone[0])


def test_interval_width_agrees_with_hanley_and_mcneil() -> None:
    rng = np.random.default_rng(8)
    labels = np.repeat([0, 1], [300, 200])
    positive = rng.normal(size=500) + 0.9 * labels
    probabilities = np.stack([-positive, positive], axis=1)
    area = roc_auc_score(labels, positive)
    low, high, _ = auc_interval(probabilities, labels)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + 199 * (q1 - area**2) + 299 * (q2 - area**2)) / (200 * 300)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.15)
    assert low < area < high


def test_interval_needs_two_patients_and_both_classes_in_most_draws() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    low, high, notes = auc_interval(probabilities, labels, groups=np.array(["x", "x", "x"]))
    assert low is None and high is None and "one patient" in notes[0]
    # One image of class 1 in 12 patients: a third of the resamples miss it, and that is said.
    labels = np.r_[1, np.zeros(11, dtype=np.int64)]
    probabilities = np.random.default_rng(0).random((12, 2))
    low, high, notes = auc_interval(probabilities, labels)
    assert low is not None and high is not None and "of 1000 resamples" in notes[0]


def test_interval_is_undefined_where_most_resamples_hold_one_class() -> None:
    probabilities = np.random.default_rng(0).random((12, 2))
    undefined = []
    for seed in range(8):
        # Two patients of one class each: about half of the resamples hold both.
        times = np.random.default_rng(seed).multinomial(2, [0.5, 0.5], size=100)
        lost = int((times != 1).any(axis=1).sum())
        low, high, notes = auc_interval(
            probabilities, np.repeat([0, 1], 6), groups=np.repeat(["x", "y"], 6), seed=seed, draws=100
        )
        undefined.append(lost > 50)
        assert (low is None) == (high is None) == (lost > 50)
        assert str(lost if lost > 50 else 100 - lost) in notes[0]
    assert 0 < sum(undefined) < 8
