"""The classes of a run's images, where the objective learns from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.manifest import Manifest
from fastmoco.errors import UserError
from fastmoco.train.config import Config


def classes(config: Config, manifest: Manifest) -> Tensor | None:
    """The class (images,) int64 of every image by the first label, -1 where its cell is empty, if the objective learns
    from it; else None. Numbers are those of the names that are there, in their order: the same on every process.

    Raises UserError where the images have no label, or fewer than two classes.
    """
    if config.loss.objective != "supcon":
        return None
    names = names_of(manifest)
    known = names != ""
    found, numbers = np.unique(names[known], return_inverse=True)
    if len(found) < 2:
        label = next(iter(manifest.labels))
        raise UserError(f"--objective supcon: label {label!r} has {len(found)} class(es) here; it takes at least 2")
    targets = np.full(len(names), -1, dtype=np.int64)
    targets[known] = numbers
    return torch.from_numpy(targets)


def names_of(manifest: Manifest) -> np.ndarray:
    """The name (images,) of each image's class by the first label, "" where it is unknown.

    Raises UserError where the images have no label.
    """
    if not manifest.labels:
        raise UserError(
            "--objective supcon learns from labels and these images have none: give --labels FILE.csv --label COLUMN, "
            "or put them into folders by class; or take --objective simclr"
        )
    label, values = next(iter(manifest.labels.items()))
    return np.array(manifest.class_names[label], dtype=object)[values].astype(str)


def describe_classes(manifest: Manifest, targets: Tensor) -> str:
    """What is learned from, in words."""
    label = next(iter(manifest.labels))
    unknown = int((targets < 0).sum())
    count = f"{int(targets.max()) + 1} classes"
    return f"classes by label {label!r}: {count}" + (f", {unknown} images of unknown class" if unknown else "")
