"""What is to be predicted, and how many labels may be used for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.budgets import draw_budget
from fastmoco.evaluate.targets import make_target, target_splits
from runs import draw_images


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """24 drawn images of 12 patients, with a binary, a three-class and two yes-or-no columns."""
    images = draw_images(tmp_path)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    for i, line in enumerate(lines):
        lines[i] = line + (",grade,left,right" if i == 0 else f",{i % 3},{int(i % 4 == 0)},{'yes' if i < 9 else 'no'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return load_manifest(images, tmp_path / "labels.csv", label=("kind", "grade", "left", "right"), progress=False)


def test_one_column_is_one_of_its_classes_and_several_are_labels(manifest: Manifest) -> None:
    binary, grades = make_target(manifest, "kind"), make_target(manifest, ["grade"], name="severity")
    assert (binary.kind, binary.class_names) == ("binary", ["0", "1"])
    assert (grades.kind, grades.name, grades.class_names) == ("multiclass", "severity", ["0", "1", "2"])
    assert binary.values.tolist() == [i // 2 % 2 for i in range(24)]
    both = make_target(manifest, ("left", "right"))
    assert (both.kind, both.name, both.class_names) == ("multilabel", "left+right", ["left", "right"])
    assert both.values.dtype == np.int64
    # Lines of the file are counted from 1, after its header.
    assert both.values.tolist() == [[int(i % 4 == 0), int(i < 9)] for i in range(1, 25)]
    assert both.classes.tolist() == [int(i % 4 == 0 or i < 9) for i in range(1, 25)]


def test_columns_that_cannot_be_predicted_are_named(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"--label colour: .* they have kind, grade, left, right"):
        make_target(manifest, "colour")
    with pytest.raises(UserError, match="--label grade: has 3 classes"):
        make_target(manifest, ["left", "grade"])
    with pytest.raises(UserError, match="name the column"):
        make_target(manifest, [])


@pytest.mark.parametrize("columns", [["kind"], ["left", "right"]])
def test_the_validation_patients_are_the_same_each_time_and_in_no_other_part(
    manifest: Manifest, columns: list[str]
) -> None:
    target = make_target(manifest, columns)
    splits = target_splits(manifest, target, seed=3)
    again = target_splits(manifest, target, seed=3)
    assert manifest.patients is not None and manifest.splits is not None
    parts = [set(manifest.patients[part].tolist()) for part in (splits.train, splits.validation, splits.test)]
    assert all(parts) and sum(map(len, parts)) == 12 == len(set.union(*parts))
    assert set(manifest.splits[splits.test].tolist()) == {"test"}
    assert splits.validation.tolist() == again.validation.tolist()


@given(
    counts=st.lists(st.integers(1, 80), min_size=2, max_size=4),
    seed=st.integers(0, 5),
    fractions=st.lists(st.floats(0.005, 1.0), min_size=2, max_size=4),
    least=st.integers(1, 5),
)
def test_small_budgets_are_part_of_larger_ones_and_each_holds_its_share_of_a_class(
    counts: list[int], seed: int, fractions: list[float], least: int
) -> None:
    # Some images that may not be drawn from, at both ends.
    train = np.arange(7, 7 + sum(counts))
    values = np.r_[np.zeros(7, int), np.random.default_rng(1).permutation(np.repeat(range(len(counts)), counts)), 0]
    before: set[int] = set()
    for fraction in sorted(fractions):
        budget = draw_budget(values, train, fraction, seed=seed, least=least)
        drawn = budget.indices.tolist()
        assert drawn == sorted(set(drawn)) and set(drawn) <= set(train.tolist())
        assert before <= set(drawn)
        before = set(drawn)
        held = np.bincount(values[drawn], minlength=len(counts))
        assert (held >= np.minimum(counts, least)).all()
        share = len(drawn) / len(train)
        assert np.abs(held - share * np.array(counts)).max() <= 1.0 + 1e-9 + 0.5 * len(counts)
        assert budget.asked == fraction
        # Either the share that was asked for, or the fewest with `least` a class: one fewer would not do.
        if len(drawn) != max(1, round(fraction * len(train))):
            assert len(drawn) > fraction * len(train) - 1 and budget.note
            assert budget.used == share
            assert (held == np.minimum(counts, least)).any()


def test_budgets_of_other_seeds_are_others() -> None:
    values, train = np.arange(200) % 2, np.arange(200)
    drawn = [draw_budget(values, train, 0.1, seed=seed).indices.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(indices) for indices in drawn] == [20, 20, 20]


def test_a_budget_that_is_too_small_says_what_was_used_instead() -> None:
    values = np.repeat([0, 1], [900, 304])
    budget = draw_budget(values, np.arange(1204), 0.01, seed=0, class_names=["calm", "ill"])
    assert budget.asked == 0.01
    assert np.bincount(values[budget.indices]).tolist() == [len(budget.indices) - 5, 5]
    assert budget.note == (
        "1 % of 1,204 is 12 images, 3 of class ill: 1.5 % (18 images) used, the least with 5 a class"
    )
    # Nothing to say.
    assert draw_budget(values, np.arange(1204), 0.1, seed=0).note == ""
    everything = draw_budget(values, np.arange(1204), 1.0, seed=0)
    assert everything.indices.tolist() == list(range(1204)) and everything.note == ""


def test_a_class_with_fewer_images_than_are_asked_for_is_named() -> None:
    values = np.repeat([0, 1], [40, 3])
    assert "training images hold only 3 of class 1" in draw_budget(values, np.arange(43), 1.0, seed=0).note
    budget = draw_budget(values, np.arange(43), 0.05, seed=0)
    assert np.bincount(values[budget.indices])[1] == 3 and "hold only 3 of class 1" in budget.note


def test_budgets_that_mean_nothing_are_refused() -> None:
    for fraction in (0.0, -0.1, 1.5):
        with pytest.raises(UserError, match="--budget"):
            draw_budget(np.arange(9) % 2, np.arange(9), fraction, seed=0)
    several = np.ones((9, 3), dtype=np.int64)
    with pytest.raises(UserError, match="several labels"):
        draw_budget(several, np.arange(9), 0.5, seed=0)
    assert len(draw_budget(several, np.arange(9), 1.0, seed=0).indices) == 9
