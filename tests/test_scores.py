"""Scores against scikit-learn, calibration against an example worked by hand, and what is undefined."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from fastmoco.evaluate.scores import auc, f1, score
from fastmoco.evaluate.weighted import CALIBRATION_BINS, Score, calibration_errors, weighted_score

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
    never = np.eye(2)[nobody]
    value, notes = f1(never, nobody, class_names=NAMES[:2])
    assert value is None and "F1 undefined" in notes[0]
    assert f1(never, np.array([0, 0, 1, 0, 1]), class_names=NAMES[:2])[0] == 0.0


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
    assert (found.average_precision, found.calibration_error) == (None, None)
    assert "NaN or infinite" in found.notes[0]


def test_no_images_are_undefined() -> None:
    found = score(np.empty((0, 2)), np.empty(0, dtype=np.int64), class_names=NAMES[:2])
    assert found.auc is None and found.notes == ("no images to score",)


def sigmoids(rng: np.random.Generator, n: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    values = (rng.random((n, labels)) < 0.3).astype(np.int64)
    return np.clip(rng.random((n, labels)) * 0.7 + 0.3 * values, 0, 1), values


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_labels_are_sklearns_macro_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, values = sigmoids(rng, 71, 4)
    probabilities = np.round(probabilities, 2)
    found = score(probabilities, values, class_names=NAMES, draws=0)
    guessed = probabilities > 0.5
    assert found.auc == pytest.approx(roc_auc_score(values, probabilities, average="macro"), abs=1e-12)
    expected = average_precision_score(values, probabilities, average="macro")
    assert found.average_precision == pytest.approx(expected, abs=1e-12)
    assert found.f1 == pytest.approx(f1_score(values, guessed, average="macro"), abs=1e-12)
    assert found.accuracy == pytest.approx(accuracy_score(values.ravel(), guessed.ravel()), abs=1e-12)
    assert found.notes == ()


def test_labels_without_both_outcomes_are_left_out_and_named() -> None:
    probabilities, values = sigmoids(np.random.default_rng(1), 40, 4)
    values[:, 1], values[:, 2] = 0, 1
    probabilities[:, 1] = 0.1
    found = score(probabilities, values, class_names=NAMES, draws=50)
    both = [roc_auc_score(values[:, c], probabilities[:, c]) for c in (0, 3)]
    assert found.auc == pytest.approx(np.mean(both), abs=1e-12)
    precisions = [average_precision_score(values[:, c], probabilities[:, c]) for c in (0, 3)]
    assert found.average_precision == pytest.approx(np.mean(precisions), abs=1e-12)
    # Label c is on every image: it has an F1, label b has none.
    each = [f1_score(values[:, c], probabilities[:, c] > 0.5) for c in (0, 2, 3)]
    assert found.f1 == pytest.approx(np.mean(each), abs=1e-12)
    assert [note.rsplit(": ", 1)[1] for note in found.notes] == ["b (none), c (all)", "b"]
    assert found.notes[0].startswith("AUC and average precision: left out")
    assert found.notes[1].startswith("F1: left out")
    nothing = score(np.full((6, 2), 0.2), np.zeros((6, 2), dtype=np.int64), class_names=NAMES[:2])
    assert (nothing.auc, nothing.average_precision, nothing.f1, nothing.low) == (None,) * 4
    assert nothing.accuracy == 1.0 and nothing.calibration_error == pytest.approx(0.2)
    assert len(nothing.notes) == 2 and all("undefined" in note for note in nothing.notes)


@pytest.mark.parametrize("classes", [2, 4])
def test_average_precision_is_sklearns_with_ties(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, 60)]
    probabilities = np.round(simplex(rng, 60 + classes, classes), 1)
    wanted = [1] if classes == 2 else range(classes)
    expected = np.mean([average_precision_score(labels == c, probabilities[:, c]) for c in wanted])
    found = score(probabilities, labels, class_names=NAMES[:classes], draws=0)
    assert found.average_precision == pytest.approx(expected, abs=1e-12)
    assert found.low is None and found.notes == ()


def test_calibration_error_worked_by_hand() -> None:
    # Confidence 0.9 three times, two right; 0.85 once, right, in the bin below; 0.6 twice, none right. Bins of 1/15:
    # 0.9 in (13/15, 14/15], 0.85 in (12/15, 13/15], 0.6 = 9/15 in (8/15, 9/15], which is closed on the right.
    # Differences: 3/6 |2/3 - 0.9| + 1/6 |1 - 0.85| + 2/6 |0 - 0.6| = 0.11667 + 0.025 + 0.2.
    first = np.array([0.9, 0.9, 0.1, 0.15, 0.6, 0.4])
    probabilities = np.stack([first, 1 - first], axis=1)
    labels = np.array([0, 1, 1, 1, 1, 0])
    found = score(probabilities, labels, class_names=NAMES[:2], draws=0)
    assert CALIBRATION_BINS == 15
    assert found.calibration_error == pytest.approx(0.7 / 6 + 0.025 + 0.2, abs=1e-12)
    # Sigmoids: 0.2 four times, once true; 0.7 and 0.7 with one true; all in one set of bins over both labels.
    sigmoid = np.array([[0.2, 0.7], [0.2, 0.2], [0.7, 0.2]])
    truth = np.array([[0, 1], [1, 0], [0, 0]])
    found = score(sigmoid, truth, class_names=NAMES[:2], draws=0)
    assert found.calibration_error == pytest.approx(4 / 6 * 0.05 + 2 / 6 * 0.2, abs=1e-12)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration_errors(np.array([[1.5, -0.5]]), np.array([0]), np.ones((1, 1)))


def test_calibrated_predictions_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    chance = rng.random(20_000)
    labels = (rng.random(20_000) < chance).astype(np.int64)
    honest = score(np.stack([1 - chance, chance], axis=1), labels, class_names=NAMES[:2], draws=0)
    sure = np.where(chance > 0.5, 0.99, 0.01)
    boastful = score(np.stack([1 - sure, sure], axis=1), labels, class_names=NAMES[:2], draws=0)
    assert honest.calibration_error is not None and honest.calibration_error < 0.01
    # Right three times in four, sure of 0.99.
    assert boastful.calibration_error == pytest.approx(0.24, abs=0.01)


@pytest.mark.parametrize("name", ["auc", "average_precision", "f1", "accuracy", "calibration_error"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_weight_of_two_is_the_image_twice(name: Score, labels: bool) -> None:
    rng = np.random.default_rng(4)
    probabilities, values = sigmoids(rng, 50, 3)
    if not labels:
        probabilities, values = simplex(rng, 50, 3), rng.integers(0, 3, 50)
    probabilities = np.round(probabilities, 2)
    times = rng.integers(0, 4, (3, 50))
    found = weighted_score(name, probabilities, values, times.T.astype(np.float64))
    for row, value in zip(times, found, strict=True):
        rows = np.repeat(np.arange(50), row)
        whole = weighted_score(name, probabilities[rows], values[rows], np.ones((len(rows), 1)))[0]
        assert value == pytest.approx(whole, abs=1e-12) and 0 < value < 1


def test_shapes_that_do_not_fit_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        score(np.full((3, 2), 0.5), np.zeros((3, 3), dtype=np.int64), class_names=NAMES[:2])
    with pytest.raises(ValueError, match="do not fit"):
        auc(np.full((3, 2), 0.5), np.zeros(3, dtype=np.int64), class_names=NAMES)
    with pytest.raises(ValueError, match="there are auc"):
        weighted_score("roc", np.full((3, 2), 0.5), np.zeros(3, dtype=np.int64), np.ones((3, 1)))  # type: ignore[arg-type]
