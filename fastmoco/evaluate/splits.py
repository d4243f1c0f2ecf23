"""Training, validation and test images, with no patient on two sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.patients import patient_groups
from fastmoco.errors import UserError

HELD_OUT = 0.2
_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Sorted int64 indices into a manifest. `origin` says in words where each split comes from."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    origin: str


def make_splits(manifest: Manifest, label: str, *, seed: int, allow_leaks: bool = False) -> Splits:
    """Split the images of `manifest` for the classes of its column `label`.

    The manifest's own splits ("train", "test" and perhaps "val" or "validation") are kept. Where it has none,
    a fifth of the images is held out for testing; where it has no validation split, a fifth of the training
    images is. Both draws depend on `seed` alone, go by patient (by image where patients are unknown) and come
    as close to a fifth of every class as patients allow.

    Raises UserError for an unknown label, an unknown or missing split, a patient in two given splits (unless
    `allow_leaks`), too few patients, a class that is absent from training, or a validation split of one
    class.
    """
    if label not in manifest.labels:
        known = ", ".join(manifest.labels) or "(none)"
        raise UserError(f"--label {label}: the data have no such label; they have {known}")
    labels, names = manifest.labels[label], manifest.class_names[label]
    groups = patient_groups(manifest.patients, len(manifest))
    unit = "image" if manifest.patients is None else "patient"
    rng = np.random.default_rng(seed)
    side: dict[str, np.ndarray] = {}
    origin = []
    if manifest.splits is not None:
        side = _given(manifest.splits)
        if manifest.patients is not None:
            _refuse_leaks(side, groups, manifest.patients, allow_leaks)
        origin.append("given: " + ", ".join(name for name in ("train", "validation", "test") if name in side))
    else:
        side["test"] = hold_out(labels, groups, rng)
        side["train"] = ~side["test"]
        origin.append(f"test drawn by {unit}")
    if "validation" not in side:
        training = np.flatnonzero(side["train"])
        side["validation"] = np.zeros(len(manifest), dtype=bool)
        side["validation"][training[hold_out(labels[training], groups[training], rng)]] = True
        side["train"] &= ~side["validation"]
        origin.append(f"validation drawn by {unit} from the training images")
    _refuse_small(side, labels, groups, label, names, unit)
    indices = {name: np.flatnonzero(mask) for name, mask in side.items()}
    return Splits(**indices, origin="; ".join(origin))


def hold_out(labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) bool mask that holds out about a fifth of the images of each class, in whole groups.

    Groups come in random order, and one is held out, or taken back in a later round, if that brings the
    classes' shares nearer to a fifth (in the sum of squares). Then a class that is still on one side only
    gets a group held out, if it has one to spare. No class is ever held out whole; the mask is empty where
    nothing can be spared.
    """
    members = np.unique(groups, return_inverse=True)[1]
    classes = np.unique(labels, return_inverse=True)[1]
    counts = np.zeros((members.max() + 1, classes.max() + 1))
    np.add.at(counts, (members, classes), 1.0)
    shares = counts / counts.sum(axis=0)
    held = np.zeros(len(shares), dtype=bool)
    share = np.zeros(shares.shape[1])

    def distance(candidate: np.ndarray) -> np.ndarray:
        return np.square(candidate - HELD_OUT).sum(axis=-1)

    def spared(candidate: np.ndarray) -> np.ndarray:
        # Shares are sums of floats: the tolerance is far below the share of one image.
        return np.all(candidate < 1.0 - 1e-9, axis=-1)

    order = rng.permutation(len(shares))
    moved = True
    while moved:
        moved = False
        for group in order:
            candidate = share - shares[group] if held[group] else share + shares[group]
            # The margin keeps rounding from moving a group to and fro for ever.
            if distance(candidate) < distance(share) - 1e-12 and spared(candidate):
                held[group] = not held[group]
                share = candidate
                moved = True
    for target in range(shares.shape[1]):
        if share[target] > 1e-9:
            continue
        candidates = share + shares
        useful = np.flatnonzero(~held & (shares[:, target] > 0) & spared(candidates))
        if len(useful):
            best = useful[distance(candidates[useful]).argmin()]
            held[best] = True
            share = candidates[best]
    return held[members]


def _given(splits: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the splits that a column names."""
    side: dict[str, np.ndarray] = {}
    for text in np.unique(splits):
        name = _NAMES.get(str(text).strip().lower())
        if name is None:
            raise UserError(
                f"the split column holds {str(text)!r}: use train, test and, if you have one, val; "
                "or name a column that does not exist with --split-column to have the splits drawn"
            )
        mask = splits == text
        side[name] = side[name] | mask if name in side else mask
    for needed in ("train", "test"):
        if needed not in side:
            raise UserError(f"the split column names no {needed} image; it needs both train and test")
    return side


def _refuse_leaks(side: dict[str, np.ndarray], groups: np.ndarray, patients: np.ndarray, allowed: bool) -> None:
    where = {name: set(groups[mask].tolist()) for name, mask in side.items()}
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        both = where.get(first, set()) & where.get(second, set())
        if both and not allowed:
            named = sorted(set(patients[np.isin(groups, list(both))].tolist()))
            shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
            raise UserError(
                f"the split column puts images of one patient in both {first} and {second}: {shown}. "
                "Scores would be too good; mend the column, or pass --allow-leaks"
            )


def _refuse_small(
    side: dict[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    label: str,
    names: list[str],
    unit: str,
) -> None:
    for name, mask in side.items():
        if not mask.any():
            count = len(np.unique(groups if name == "test" else groups[side["train"]]))
            raise UserError(
                f"--label {label}: none of the {count} {unit}s can be spared for the {name} split: training "
                f"must keep some of each of the {len(names)} classes of that column; where that is the right one, give "
                "more data, or a column with train, val and test"
            )
    missing = np.setdiff1d(labels, labels[side["train"]])
    if len(missing):
        shown = ", ".join(repr(names[c]) for c in missing)
        raise UserError(f"--label {label}: no training image is of class {shown}, so it cannot be learnt")
    if len(np.unique(labels[side["validation"]])) < 2:
        only = names[int(labels[side["validation"]][0])]
        raise UserError(
            f"--label {label}: every validation image is of class {only!r}, which chooses nothing; "
            f"each class needs two {unit}s or more in the training images, or a val split of your own"
        )
