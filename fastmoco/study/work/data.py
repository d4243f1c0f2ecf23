"""What the report needs to know of the images, so that it needs nothing but the cells' files."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmoco.evaluate.leaks import find_leaks
from fastmoco.study.cell import Cell
from fastmoco.study.cells import OF_DATA, SECOND
from fastmoco.study.work.context import Context


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"counts", "patients" by split, "targets": {name: {"kind", "class_names", "test": values, "counts"}},
    "test_groups" (n_test,) numbers of patients, "origin" of the splits, "leaks", "print": what identifies the data}."""
    splits, manifest = context.splits, context.manifest
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    targets = {context.data.label: context.target}
    if context.data.multilabel:
        targets[SECOND] = context.second
    groups = np.unique(context.groups[splits.test], return_inverse=True)[1]
    patients = {name: len(np.unique(context.groups[part])) for name, part in parts.items()}
    return {
        "counts": {name: len(part) for name, part in parts.items()},
        "patients": None if manifest.patients is None else patients,
        "targets": {
            name: {
                "kind": target.kind,
                "class_names": target.class_names,
                "test": target.values[splits.test].tolist(),
                "counts": {part: _count(target.values[where], target.class_names) for part, where in parts.items()},
            }
            for name, target in targets.items()
        },
        "test_groups": groups.tolist(),
        # That of the list, which gives them, is another.
        "origin": cell.settings["origin"],
        "leaks": find_leaks(manifest, splits),
        "print": _print(cell),
    }


def _print(cell: Cell) -> dict[str, Any]:
    """What `prepare` found, as `make_cells` takes it."""
    own = {name: value for name, value in cell.settings["data"].items() if name not in ("name", "size")}
    own |= {name: cell.settings[name] for name in OF_DATA}
    second = cell.settings[SECOND]["labels"]
    return own if second is None else own | {SECOND: second}


def _count(values: np.ndarray, names: list[str]) -> dict[str, int]:
    """Images of each class, or that have each label."""
    counts = values.sum(axis=0) if values.ndim == 2 else np.bincount(values, minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))
