"""Measures of representations against closed forms and against computations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma, ive
from scipy.stats import entropy

from fastmoco.evaluate import measures
from fastmoco.evaluate.measures import alignment, effective_rank, rankme, tmi, uniformity


def white(n: int, d: int) -> np.ndarray:
    """(n, d) centred features whose covariance is exactly a multiple of the identity."""
    centred = np.random.default_rng(0).normal(size=(n, d))
    return np.linalg.qr(centred - centred.mean(axis=0))[0]


def test_ranks_of_an_identity_covariance_and_of_one_direction() -> None:
    features = white(50, 7)
    assert effective_rank(features + 5.0) == pytest.approx(7.0, rel=1e-12)
    assert rankme(features) == pytest.approx(7.0, rel=1e-5)
    line = np.outer(np.arange(1.0, 21.0), [1.0, -2.0, 0.5])
    assert effective_rank(line + 3.0) == pytest.approx(1.0, abs=1e-9)
    assert rankme(line) == pytest.approx(1.0, abs=1e-5)


def test_ranks_are_the_entropies_of_the_singular_values() -> None:
    features = np.random.default_rng(1).normal(size=(30, 6)) * [5, 3, 1, 1, 0.1, 0] + 2.0
    values = torch.linalg.svdvals(torch.from_numpy(features)).numpy()
    p = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
    # Of the centred features: square roots of the covariance's eigenvalues.
    spread = np.sqrt(np.clip(np.linalg.eigvalsh(np.cov(features.T)), 0, None))
    assert effective_rank(features) == pytest.approx(math.exp(entropy(spread)), rel=1e-6)


def test_epsilon_is_added_to_each_share() -> None:
    # One singular value of 1 and one of 0: shares 1.25 and 0.25.
    features = np.array([[1.0, 0.0], [0.0, 0.0]])
    wanted = math.exp(-(1.25 * math.log(1.25) + 0.25 * math.log(0.25)))
    assert rankme(features, epsilon=0.25) == pytest.approx(wanted, rel=1e-12)


def test_alignment_of_equal_opposite_and_turned_views() -> None:
    first = np.array([[2.0, 0.0], [0.0, 0.5], [3.0, 4.0]])
    assert alignment(first, 7 * first) == pytest.approx(0.0, abs=1e-15)
    assert alignment(first, -first) == pytest.approx(4.0)
    turned = first @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    assert alignment(first, turned) == pytest.approx(2.0)
    assert alignment(first, turned, alpha=1.0) == pytest.approx(math.sqrt(2.0))
    with pytest.raises(ValueError, match="one shape"):
        alignment(first, first[:2])


def test_uniformity_of_a_simplex_and_of_a_circle() -> None:
    # The m corners of a simplex are 2 m / (m - 1) apart, squared.
    m = 5
    corners = np.eye(m) - 1 / m
    assert uniformity(corners) == pytest.approx(-2 * 2 * m / (m - 1), rel=1e-12)
    assert uniformity(corners, t=0.5) == pytest.approx(-0.5 * 2 * m / (m - 1), rel=1e-12)
    assert uniformity(np.ones((6, 3))) == pytest.approx(0.0, abs=1e-15)
    # Evenly over a circle, exp(-2 (2 - 2 cos a)) has the mean I0(4) exp(-4); each of m points meets m - 1 others.
    m = 40
    angles = np.arange(m) * 2 * np.pi / m
    circle = 3.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert uniformity(circle) == pytest.approx(math.log((m * ive(0, 4.0) - 1) / (m - 1)), rel=1e-9)


@pytest.mark.parametrize("block", [1000, 7])
def test_uniformity_is_the_papers_own_expression(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_BLOCK", block)
    features = np.random.default_rng(2).normal(size=(30, 5))
    unit = torch.nn.functional.normalize(torch.from_numpy(features))
    wanted = torch.pdist(unit).pow(2).mul(-2).exp().mean().log().item()
    assert uniformity(features) == pytest.approx(wanted, rel=1e-12)


def test_tmi_is_the_conditional_entropy_by_neighbours() -> None:
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    wanted = 0.0
    for label in range(3):
        own = features[labels == label]
        apart = np.abs(own[:, None, :] - own[None, :, :]).max(axis=2)
        logs = [math.log(2 * sorted(row)[3]) for row in apart.tolist()]
        wanted += len(own) / 60 * (digamma(len(own)) - digamma(3) + 4 * np.mean(logs))
    assert tmi(features, labels) == pytest.approx(wanted, rel=1e-12)


def test_tmi_comes_to_the_entropy_of_known_distributions() -> None:
    rng = np.random.default_rng(4)
    n = 4000
    # Uniform over a square of side 20: 2 log 20; normal with deviation 10: log(10 sqrt(2 pi e)) a dimension.
    square, bell = 20 * rng.random((n, 2)), 10 * rng.normal(size=(n, 2)) + 1000
    labels = np.r_[np.zeros(n, dtype=int), np.ones(n, dtype=int)]
    wanted = 0.5 * (2 * math.log(20)) + 0.5 * (2 * math.log(10 * math.sqrt(2 * math.pi * math.e)))
    found = tmi(np.r_[square, bell], labels)
    assert found == pytest.approx(wanted, abs=0.05)
    # Stretching by 3 adds log 3 a dimension.
    assert tmi(3 * np.r_[square, bell], labels) == pytest.approx(found + 2 * math.log(3), rel=1e-9)


def test_tmi_of_coinciding_images_is_minus_infinity() -> None:
    features = np.random.default_rng(7).random((20, 3))
    features[:4] = features[0]
    assert tmi(features, np.zeros(20, dtype=int)) == -math.inf


def test_tmi_leaves_out_classes_without_enough_neighbours() -> None:
    rng = np.random.default_rng(6)
    features, labels = rng.normal(size=(23, 2)), np.r_[np.zeros(20, dtype=int), np.ones(3, dtype=int)]
    assert tmi(features, labels) == pytest.approx(tmi(features[:20], labels[:20]))
    assert math.isnan(tmi(features[20:], labels[20:]))
    with pytest.raises(ValueError, match="23 rows of features for 3"):
        tmi(features, labels[20:])


def test_undefined_measures_are_nan() -> None:
    bad = np.ones((8, 3))
    bad[2, 1] = np.nan
    labels = np.zeros(8, dtype=int)
    values = [rankme(bad), effective_rank(bad), alignment(bad, bad), uniformity(bad), tmi(bad, labels)]
    assert all(math.isnan(value) for value in values)
    assert math.isnan(rankme(np.zeros((5, 2)))) and math.isnan(effective_rank(np.ones((5, 2))))
    assert math.isnan(uniformity(np.ones((1, 3))))
