"""Splits: nobody on two sides, every class where it is needed, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmoco.data.manifest import Manifest
from fastmoco.data.patients import patient_groups
from fastmoco.errors import UserError
from fastmoco.evaluate.splits import Splits, hold_out, make_splits


def manifest(labels: np.ndarray, *, patients: np.ndarray | None = None, splits: np.ndarray | None = None) -> Manifest:
    n = len(labels)
    return Manifest(
        root=Path("nowhere"),
        files=[f"{i}.png" for i in range(n)],
        sizes=np.full((n, 2), 8, dtype=np.int32),
        labels={"y": np.asarray(labels, dtype=np.int64)},
        class_names={"y": [f"class{c}" for c in range(int(max(labels)) + 1)]},
        patients=patients,
        splits=splits,
    )


def random_patients(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Uneven patients: some with one image, some with many."""
    weights = rng.dirichlet(np.full(count, 0.7))
    return np.array([f"p{i:03d}" for i in rng.choice(count, n, p=weights)])


def assert_partition(found: Splits, n: int) -> None:
    together = np.concatenate([found.train, found.validation, found.test])
    np.testing.assert_array_equal(np.sort(together), np.arange(n))
    for part in (found.train, found.validation, found.test):
        assert part.dtype == np.int64 and len(part)
        np.testing.assert_array_equal(part, np.unique(part))


@pytest.mark.parametrize("seed", range(40))
def test_drawn_splits_are_pure_partitions_near_the_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(300, 800)), int(rng.integers(2, 6))
    patients = random_patients(rng, n, int(rng.integers(60, 150)))
    labels = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 4.0)))
    found = make_splits(manifest(labels, patients=patients), "y", seed=seed)
    assert_partition(found, n)
    owners = [set(patients[part]) for part in (found.train, found.validation, found.test)]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    for c in range(classes):
        total = (labels == c).sum()
        test = (labels[found.test] == c).sum()
        validation = (labels[found.validation] == c).sum()
        # Within a few images of a fifth, and of a fifth of the rest: one patient may weigh several.
        assert abs(test - 0.2 * total) <= max(3, 0.08 * total)
        assert abs(validation - 0.2 * (total - test)) <= max(3, 0.08 * total)


@pytest.mark.parametrize("seed", range(20))
def test_by_image_the_shares_are_exact_to_the_nearest_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(4), np.arange(4), rng.choice(4, 203, p=[0.7, 0.2, 0.08, 0.02])]
    found = make_splits(manifest(labels), "y", seed=seed)
    assert_partition(found, len(labels))
    for c in range(4):
        total, test = (labels == c).sum(), (labels[found.test] == c).sum()
        assert abs(test - 0.2 * total) <= 0.5 or test == 1
        validation = (labels[found.validation] == c).sum()
        assert abs(validation - 0.2 * (total - test)) <= 0.5 or validation == 1
        assert (labels[found.train] == c).sum() >= 1


def test_the_seed_decides_and_every_image_gets_its_turn() -> None:
    labels = np.arange(60) % 2
    patients = np.array([f"p{i // 4}" for i in range(60)])
    data = manifest(labels, patients=patients)
    again = [make_splits(data, "y", seed=9) for _ in range(2)]
    np.testing.assert_array_equal(again[0].test, again[1].test)
    np.testing.assert_array_equal(again[0].validation, again[1].validation)
    tested = np.zeros(60)
    for seed in range(200):
        tested[make_splits(data, "y", seed=seed).test] += 1
    # 3 patients of 15 each time: 40 of 200 expected, standard deviation 5.7.
    assert tested.min() > 15 and tested.max() < 70


def test_large_patients_are_not_favoured_for_testing() -> None:
    # One patient has an eighth of the images; the others four each.
    patients = np.r_[np.full(20, "big"), np.repeat([f"p{i}" for i in range(35)], 4)]
    labels = np.arange(160) % 2
    times = sum(0 in set(make_splits(manifest(labels, patients=patients), "y", seed=seed).test) for seed in range(100))
    assert 3 <= times <= 40


def test_given_splits_are_kept_and_validation_comes_out_of_training() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{i}" for i in range(40)], 5)
    splits = np.where(np.arange(200) < 150, "train", "Test")
    labels = rng.integers(0, 2, 200)
    found = make_splits(manifest(labels, patients=patients, splits=splits), "y", seed=3)
    assert_partition(found, 200)
    np.testing.assert_array_equal(found.test, np.arange(150, 200))
    assert not set(patients[found.validation]) & set(patients[found.train])
    assert found.origin == "given: train, test; validation drawn by patient from the training images"


@pytest.mark.parametrize("name", ["val", "validation"])
def test_given_validation_is_kept(name: str) -> None:
    splits = np.array(["train"] * 10 + [name] * 4 + ["test"] * 6)
    found = make_splits(manifest(np.arange(20) % 2, splits=splits), "y", seed=0)
    np.testing.assert_array_equal(found.train, np.arange(10))
    np.testing.assert_array_equal(found.validation, np.arange(10, 14))
    np.testing.assert_array_equal(found.test, np.arange(14, 20))


@pytest.mark.parametrize("pair", [("train", "test"), ("train", "val"), ("val", "test")])
def test_a_patient_in_two_given_splits_is_refused_by_name_unless_allowed(pair: tuple[str, str]) -> None:
    splits = np.array(["train"] * 12 + ["val"] * 12 + ["test"] * 12)
    patients = np.array([f"p{i // 3:04d}" for i in range(36)])
    for side in pair:
        patients[np.flatnonzero(splits == side)[4]] = "leaky"
    data = manifest(np.arange(36) % 2, patients=patients, splits=splits)
    with pytest.raises(UserError, match=r"leaky.*--allow-leaks"):
        make_splits(data, "y", seed=0)
    assert_partition(make_splits(data, "y", seed=0, allow_leaks=True), 36)


def test_unnamed_patients_are_each_their_own() -> None:
    patients = np.array(["", "a", "", "a", "b", ""])
    groups = patient_groups(patients, 6)
    assert groups[1] == groups[3] and len(np.unique(groups)) == 5
    # Images without a patient lie on both given sides: no leak is known of.
    splits = np.array(["train"] * 10 + ["test"] * 10)
    data = manifest(np.arange(20) % 2, patients=np.full(20, ""), splits=splits)
    assert_partition(make_splits(data, "y", seed=0), 20)


@pytest.mark.parametrize("seed", range(30))
def test_hold_out_never_takes_a_class_whole_and_takes_some_of_each_where_it_can(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(6, 60)), int(rng.integers(2, 5))
    labels = rng.choice(classes, n, p=rng.dirichlet(np.ones(classes)))
    groups = rng.choice(int(rng.integers(3, 25)), n)
    held = hold_out(labels, groups, np.random.default_rng(seed))
    for g in np.unique(groups):
        assert len(np.unique(held[groups == g])) == 1
    for c in np.unique(labels):
        assert not held[labels == c].all()
    if len(np.unique(groups)) == n:
        for c in np.unique(labels):
            assert held[labels == c].any() == ((labels == c).sum() > 1)


def test_hold_out_spares_a_class_that_one_patient_owns_however_well_the_rest_would_fit() -> None:
    # The owner of class 0 has just a fifth of each of thirty other classes.
    labels = np.r_[np.zeros(5, dtype=int), np.tile(np.arange(1, 31), 10)]
    groups = np.r_[np.zeros(5, dtype=int), np.repeat([0, 0, 1, 2, 3, 4, 5, 6, 7, 8], 30)]
    for seed in range(20):
        held = hold_out(labels, groups, np.random.default_rng(seed))
        assert held.any() and not held[groups == 0].any()


def test_mistakes_say_what_to_do() -> None:
    labels = np.arange(20) % 2
    with pytest.raises(UserError, match=r"--label z: .*they have y"):
        make_splits(manifest(labels), "z", seed=0)
    with pytest.raises(UserError, match=r"'fold1'.*--split-column"):
        make_splits(manifest(labels, splits=np.array(["train"] * 19 + ["fold1"])), "y", seed=0)
    with pytest.raises(UserError, match="names no test image"):
        make_splits(manifest(labels, splits=np.full(20, "train")), "y", seed=0)
    with pytest.raises(UserError, match="names no train image"):
        make_splits(manifest(labels, splits=np.full(20, "test")), "y", seed=0)
    with pytest.raises(UserError, match="none of the 1 patients can be spared for the test split"):
        make_splits(manifest(labels, patients=np.full(20, "only")), "y", seed=0)
    two = np.repeat(["a", "b"], 10)
    with pytest.raises(UserError, match=r"1 patients can be spared for the validation split: .* each of the 2 classes"):
        make_splits(manifest(labels, patients=two), "y", seed=0)
    given = np.where(np.arange(20) < 14, "train", "test")
    with pytest.raises(UserError, match="no training image is of class 'class2'"):
        make_splits(manifest(np.where(np.arange(20) == 19, 2, labels), splits=given), "y", seed=0)
    once = np.zeros(20, dtype=int)
    once[0] = once[15] = 1
    with pytest.raises(UserError, match="every validation image is of class 'class0'"):
        make_splits(manifest(once, splits=given), "y", seed=0)
