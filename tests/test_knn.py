"""kNN against a loop in float64, and the leave-one-out monitor."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fastmoco.evaluate import knn
from fastmoco.evaluate.knn import knn_probabilities, monitor


def naive(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    k: int,
    bank_groups: np.ndarray | None = None,
    query_groups: np.ndarray | None = None,
) -> np.ndarray:
    rows = []
    for q, query in enumerate(queries.astype(np.float64)):
        neighbours = []
        for b, other in enumerate(bank.astype(np.float64)):
            if bank_groups is not None and query_groups is not None and bank_groups[b] == query_groups[q]:
                continue
            cosine = query @ other / np.sqrt((query @ query) * (other @ other))
            neighbours.append((cosine, labels[b]))
        neighbours.sort(reverse=True)
        votes = np.zeros(classes)
        for cosine, label in neighbours[:k]:
            votes[label] += np.exp(cosine / 0.07)
        rows.append(votes / votes.sum())
    return np.stack(rows)


@pytest.mark.parametrize(("n", "m", "d", "classes", "k"), [(37, 11, 5, 2, 20), (53, 7, 3, 4, 5), (9, 1, 2, 3, 1)])
def test_probabilities_are_those_of_a_loop(n: int, m: int, d: int, classes: int, k: int) -> None:
    rng = np.random.default_rng(n)
    # Lengths over four orders of magnitude: only directions may count.
    bank = (rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 2, (n, 1))).astype(np.float32)
    queries = rng.normal(size=(m, d)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    found = knn_probabilities(bank, labels, queries, classes=classes, k=k)
    # exp(s / 0.07) turns float32's 6e-8 of a cosine into at most 1e-5 of a vote.
    np.testing.assert_allclose(found, naive(bank, labels, queries, classes, k), atol=2e-5)


def test_k_is_capped_by_the_bank() -> None:
    rng = np.random.default_rng(0)
    bank, labels = rng.normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 0, 1, 1, 0])
    queries = rng.normal(size=(3, 4)).astype(np.float32)
    found = knn_probabilities(bank, labels, queries, classes=2, k=20)
    np.testing.assert_allclose(found, naive(bank, labels, queries, 2, 6), atol=2e-5)


def test_own_group_has_no_vote_even_where_few_others_are_left() -> None:
    rng = np.random.default_rng(1)
    bank, labels = rng.normal(size=(23, 3)).astype(np.float32), rng.integers(0, 3, 23)
    queries = rng.normal(size=(5, 3)).astype(np.float32)
    # Group 0 owns all but four of the bank: its queries have fewer than k neighbours left.
    bank_groups = np.r_[np.zeros(19, dtype=int), 1, 2, 2, 3]
    query_groups = np.array([0, 0, 1, 2, 7])
    found = knn_probabilities(bank, labels, queries, classes=3, k=8, exclude_groups=(bank_groups, query_groups))
    np.testing.assert_allclose(found, naive(bank, labels, queries, 3, 8, bank_groups, query_groups), atol=2e-5)


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(45, 6)).astype(np.float32), rng.integers(0, 2, 45)
    groups = np.arange(45) // 3
    whole = knn_probabilities(features, labels, features, classes=2, exclude_groups=(groups, groups))
    monkeypatch.setattr(knn, "_CHUNK_BYTES", 4 * 45 * 7)  # 7 queries at a time, 3 in the last chunk
    parts = knn_probabilities(features, labels, features, classes=2, exclude_groups=(groups, groups))
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_zero_vector_is_equally_far_from_all_and_no_neighbour_is_nan() -> None:
    bank = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]], dtype=np.float32)
    found = knn_probabilities(bank, np.array([0, 0, 1, 1]), np.zeros((1, 2), np.float32), classes=2)
    np.testing.assert_allclose(found, [[0.5, 0.5]])
    groups = np.zeros(4, dtype=int)
    lonely = knn_probabilities(bank, np.array([0, 0, 1, 1]), bank[:1], classes=2, exclude_groups=(groups, groups[:1]))
    assert np.isnan(lonely).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_monitor_is_leave_one_out(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, 47)]
    features = (rng.normal(size=(len(labels), 4)) + np.eye(4)[labels]).astype(np.float32)
    alone = np.arange(len(labels))
    expected = naive(features, labels, features, classes, 20, alone, alone)
    area = roc_auc_score(labels, expected[:, 1]) if classes == 2 else roc_auc_score(labels, expected, multi_class="ovr")
    found = monitor(features, labels, None)
    assert found["accuracy"] == pytest.approx((expected.argmax(1) == labels).mean())
    assert found["auc"] == pytest.approx(area, abs=1e-6)
    assert set(found) == {"accuracy", "auc"}


def test_monitor_does_not_let_a_patient_vouch_for_itself() -> None:
    rng = np.random.default_rng(4)
    # Images of a patient look alike, and their label is a coin toss: there is nothing to learn across
    # patients.
    patients = np.repeat([f"p{i}" for i in range(120)], 6)
    labels = np.repeat(rng.integers(0, 2, 120), 6)
    features = np.repeat(rng.normal(size=(120, 16)), 6, axis=0) + 0.01 * rng.normal(size=(720, 16))
    assert monitor(features, labels, None)["auc"] > 0.99
    assert abs(monitor(features, labels, patients)["auc"] - 0.5) < 0.12
    # Images without a named patient are strangers to each other.
    assert monitor(features, labels, np.full(720, ""))["auc"] > 0.99


def test_monitor_says_undefined() -> None:
    rng = np.random.default_rng(5)
    features, labels = rng.normal(size=(12, 3)), np.array([0, 1] * 6)
    spoilt = features.copy()
    spoilt[7, 1] = np.nan
    assert monitor(spoilt, labels, None) == {"accuracy": None, "auc": None}
    assert monitor(features, labels, np.full(12, "same")) == {"accuracy": None, "auc": None}
    assert monitor(features, np.zeros(12, dtype=np.int64), None) == {"accuracy": 1.0, "auc": None}
