"""Label budgets: some of the training images, drawn so that small budgets are part of the larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmoco.errors import UserError

LEAST = 5
# Sets the draw apart from others with the same seed.
_STREAM = 0xB0D6E7


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`indices` are the images whose labels may be used, sorted, int64.

    `asked` and `used` are shares of the training images, in (0, 1]. `note` says in words what was used in place of what
    was asked; it is empty where that is the same.
    """

    indices: np.ndarray
    asked: float
    used: float
    note: str = ""


def draw_budget(
    values: np.ndarray,
    train: np.ndarray,
    fraction: float,
    *,
    seed: int,
    least: int = LEAST,
    class_names: Sequence[str] | None = None,
) -> Budget:
    """Draw the share `fraction` of the images `train` (m,), indices into the class numbers `values` (n,).

    For one `seed` all budgets are the beginnings of one order of the images, so that a smaller one is part of every
    larger one. In it the classes are spread evenly: any beginning holds of each class its share, to within an image
    or so. Where that leaves a class fewer than `least` images, the shortest beginning that does not is taken instead,
    and `note` says so, by `class_names` where given; of a class that has fewer in all, all are asked for.

    Raises UserError for a fraction outside (0, 1], and for several labels an image, values (n, L), where the fraction
    is less than 1: they have no classes to draw by.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--budget {fraction:g}: needs a share of the training images, above 0 and at most 1")
    if fraction == 1:
        return Budget(indices=np.sort(train), asked=1.0, used=1.0, note=_scarce(values[train], least, class_names))
    if values.ndim != 1:
        raise UserError(
            f"--budget {fraction:g}: budgets are drawn class by class, and a target of several labels has no classes; "
            "leave the budget at 1, or name one label"
        )
    order = _spread_order(values[train], np.random.default_rng([seed, _STREAM]))
    ordered = values[train][order]
    asked = max(1, round(fraction * len(train)))
    used = asked
    for number in np.unique(ordered):
        places = np.flatnonzero(ordered == number)
        used = max(used, int(places[min(least, len(places)) - 1]) + 1)
    notes = []
    if used > asked:
        counts = {int(c): int((ordered[:asked] == c).sum()) for c in np.unique(ordered)}
        rarest = min(counts, key=lambda c: counts[c])
        notes.append(
            f"{100 * fraction:.3g} % of {len(train):,} is {asked:,} images, {counts[rarest]} of class "
            f"{_name(rarest, class_names)}: {100 * used / len(train):.3g} % ({used:,} images) used, the least with "
            f"{least} a class"
        )
    scarce = _scarce(ordered, least, class_names)
    return Budget(
        indices=np.sort(train[order[:used]]),
        asked=fraction,
        used=used / len(train) if used > asked else fraction,
        note="; ".join(notes + [scarce] * bool(scarce)),
    )


def _spread_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(m,) positions: each class in random order, and spread evenly over the whole."""
    # The j-th of a class's n images belongs at the share (j + 1/2) / n of the way; chance orders those of one place.
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for number in np.unique(labels):
        own = shuffled[labels[shuffled] == number]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def _scarce(labels: np.ndarray, least: int, class_names: Sequence[str] | None) -> str:
    """Which classes have fewer than `least` images in all; "" where none has, or an image has several labels."""
    if labels.ndim != 1:
        return ""
    numbers, counts = np.unique(labels, return_counts=True)
    few = [f"{n} of class {_name(int(c), class_names)}" for c, n in zip(numbers, counts, strict=True) if n < least]
    return f"the training images hold only {', '.join(few)}" if few else ""


def _name(number: int, class_names: Sequence[str] | None) -> str:
    return str(number) if class_names is None else class_names[number]
