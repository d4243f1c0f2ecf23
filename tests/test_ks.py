"""KS distances against the definition, and which runs and classes are compared."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco.evaluate.ks import ks_distances


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """The greatest gap of the two empirical distribution functions, at every observed value."""
    return max(abs(np.mean(first <= x) - np.mean(second <= x)) for x in np.r_[first, second])


def runs(seeds: int, draws: int, images: int, classes: int, seed: int = 0) -> np.ndarray:
    # Rounded, so that there are ties within and between runs.
    return np.round(np.random.default_rng(seed).random((seeds, draws, images, classes)), 1)


def test_each_draw_is_compared_with_the_all_label_run_of_its_seed_class_by_class() -> None:
    few, full = runs(3, 2, 31, 4), runs(3, 1, 31, 4, seed=1)
    found = ks_distances(few, full, kind="multiclass", class_names="abcd")
    assert found.class_names == ("a", "b", "c", "d") and found.values.shape == (3, 2, 4)
    for seed, draw, c in np.ndindex(3, 2, 4):
        wanted = by_definition(few[seed, draw, :, c], full[seed, 0, :, c])
        assert found.values[seed, draw, c] == pytest.approx(wanted, abs=1e-12)
    assert found.mean == pytest.approx(found.values.reshape(6, 4).mean(axis=0))
    assert found.overall == pytest.approx(found.values.mean())


def test_binary_targets_compare_class_1_and_multilabel_ones_every_label() -> None:
    few, full = runs(1, 1, 20, 2), runs(1, 1, 20, 2, seed=1)
    binary = ks_distances(few, full, kind="binary", class_names=["no", "yes"])
    assert binary.class_names == ("yes",)
    assert binary.values[0, 0, 0] == pytest.approx(by_definition(few[0, 0, :, 1], full[0, 0, :, 1]))
    assert ks_distances(few, full, kind="multilabel", class_names=["x", "y"]).values.shape == (1, 1, 2)


def test_several_all_label_runs_of_a_seed_are_averaged() -> None:
    few, full = runs(2, 1, 20, 2), runs(2, 3, 20, 2, seed=1)
    found = ks_distances(few, full, kind="binary", class_names=["no", "yes"])
    each = [ks_distances(few, full[:, [e]], kind="binary", class_names=["no", "yes"]).values for e in range(3)]
    assert found.values == pytest.approx(np.mean(each, axis=0))
    assert np.ptp(each, axis=0).max() > 0


def test_same_and_disjoint_outputs_are_0_and_1() -> None:
    full = np.linspace(0.0, 0.4, 30).reshape(1, 1, 15, 2)
    names = ["no", "yes"]
    assert ks_distances(full, full, kind="binary", class_names=names).overall == 0.0
    assert ks_distances(full + 0.5, full, kind="binary", class_names=names).overall == 1.0
    # Of distributions, not of images: in another order they are the same.
    assert ks_distances(full[:, :, ::-1], full, kind="binary", class_names=names).overall == 0.0


def test_the_run_to_draw_is_the_one_nearest_to_the_mean() -> None:
    full = np.linspace(0.0, 1.0, 101).reshape(1, 1, 101, 1).repeat(2, axis=0)
    few = np.stack([np.stack([full[0, 0] + shift for shift in pair]) for pair in ((0.0, 0.9), (0.5, 0.1))])
    found = ks_distances(few, full, kind="multilabel", class_names=["x"])
    # Distances 0, 0.9, 0.5, 0.1 (in hundred-and-firsts), 0.375 in the mean.
    assert found.pair == (1, 0)


def test_not_finite_runs_are_nan_and_shapes_that_do_not_pair_are_refused() -> None:
    few, full = runs(2, 2, 10, 2), runs(2, 1, 10, 2)
    few[1, 0, 3, 1] = np.nan
    found = ks_distances(few, full, kind="binary", class_names=["no", "yes"])
    assert np.isnan(found.values[:, :, 0]).tolist() == [[False, False], [True, False]]
    with pytest.raises(ValueError, match="do not pair"):
        ks_distances(few, full[:1], kind="binary", class_names=["no", "yes"])
    with pytest.raises(ValueError, match="1 class names"):
        ks_distances(few, full, kind="binary", class_names=["no"])
