"""Images whose classes are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmoco.data.listing import FOLDER_LABEL
from fastmoco.data.manifest import Manifest
from fastmoco.data.sizes import show_count
from fastmoco.errors import UserError


def labelled(manifest: Manifest, labels: Sequence[str]) -> np.ndarray:
    """(n,) bool: which of the n images have a class in every one of the columns `labels`."""
    known: np.ndarray = np.all([manifest.classes(label) >= 0 for label in labels], axis=0)
    return known


def only_labelled(manifest: Manifest, labels: Sequence[str]) -> Manifest:
    """The images that have a class in every one of the columns `labels`, with these columns alone.

    Where others have none, classes are those that are left, numbered anew in their order. Raises UserError where a
    column then has fewer than two.
    """
    known = labelled(manifest, labels)
    some = manifest.select(known)
    some.labels = {label: manifest.labels[label][known] for label in labels}
    some.class_names = {label: manifest.class_names[label] for label in labels}
    # An empty cell is among the names also where its image did not decode and is not here.
    if known.all() and all("" not in names for names in some.class_names.values()):
        return some
    for label in labels:
        there, some.labels[label] = np.unique(manifest.classes(label)[known], return_inverse=True)
        some.class_names[label] = [manifest.known_classes(label)[number] for number in there.tolist()]
        if len(there) < 2:
            which = f"a class in all of {', '.join(labels)}" if len(labels) > 1 else "a class"
            of_one = f", and those are all of class {some.class_names[label][0]!r}" if len(there) else ""
            raise UserError(
                f"--label {label}: {len(some)} of {len(manifest)} images have {which}{of_one}; there is nothing to "
                "tell apart"
            )
    return some


# Classes of images are seldom more; folders that are more are rather patients, or slides.
MANY_FOLDERS = 20


def doubt_folders(label: str, classes: Sequence[str]) -> str:
    """What to do if the `classes` of `label` are none: where they are many folders; else ""."""
    if label != FOLDER_LABEL or len(classes) <= MANY_FOLDERS:
        return ""
    return "if these are patients, not classes, give --labels a CSV file with columns file and patient"


def describe_unlabelled(images: int, labels: Sequence[str]) -> str:
    """A sentence on how many images were left out."""
    return f"{show_count(images, 'image')} without a class in {', '.join(labels)} left out."
