"""What is to be predicted of an image: one of several classes, or any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.splits import Splits, make_splits

Kind = Literal["binary", "multiclass", "multilabel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The truth about n images.

    `values` are int64. "binary" and "multiclass": (n,) class numbers, 0 to C - 1, whose probabilities (n, C) are a
    softmax. "multilabel": (n, C) zeros and ones, one column a label, whose probabilities (n, C) are sigmoids.
    `class_names` names the C classes or labels.
    """

    name: str
    kind: Kind
    class_names: list[str]
    values: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """(n,) int64 that splits are made alike in: the class numbers; of several labels, whether an image has any."""
        return self.values.max(axis=1) if self.kind == "multilabel" else self.values


def make_target(manifest: Manifest, columns: str | Sequence[str], name: str | None = None) -> Target:
    """The target that label column `columns` of `manifest` holds, or with several the one of all of them.

    One column is binary or multi-class, by its number of classes. Several are multi-label, and each has to have two
    classes, the second of which (1 of 0 and 1, yes of no and yes) means that the image has the label. `name` is the
    column's if not given, or the columns' with a + between them. Raises UserError for a column that is not there, or
    one of several that has not two classes.
    """
    columns = [columns] if isinstance(columns, str) else list(columns)
    if not columns:
        raise UserError("--label: name the column, or the columns, that are to be predicted")
    for column in columns:
        if column not in manifest.labels:
            known = ", ".join(manifest.labels) or "(none)"
            raise UserError(f"--label {column}: the data have no such label; they have {known}")
    name = name or "+".join(columns)
    if len(columns) == 1:
        names = manifest.class_names[columns[0]]
        kind: Kind = "binary" if len(names) == 2 else "multiclass"
        return Target(name=name, kind=kind, class_names=list(names), values=manifest.labels[columns[0]])
    for column in columns:
        names = manifest.class_names[column]
        if len(names) != 2:
            raise UserError(
                f"--label {column}: has {len(names)} classes; of several labels each says yes or no: 0 and 1. Name it "
                "alone to tell its classes apart"
            )
    values = np.stack([manifest.labels[column] for column in columns], axis=1).astype(np.int64)
    return Target(name=name, kind="multilabel", class_names=columns, values=values)


def target_splits(manifest: Manifest, target: Target, *, seed: int, allow_leaks: bool = False) -> Splits:
    """`make_splits` for `target`; where it has several labels, parts are alike in how many images have any of them."""
    names = ["none", "any"] if target.kind == "multilabel" else target.class_names
    own = replace(
        manifest,
        labels=manifest.labels | {target.name: target.classes},
        class_names=manifest.class_names | {target.name: names},
    )
    return make_splits(own, target.name, seed=seed, allow_leaks=allow_leaks)
