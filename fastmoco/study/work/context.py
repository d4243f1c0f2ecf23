"""What the cells of one set of images share: read once a process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data.labelled import only_labelled
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.data.patients import patient_groups
from fastmoco.data.sizes import show_count
from fastmoco.errors import UserError
from fastmoco.evaluate.images import Images, load_images
from fastmoco.evaluate.leaks import refuse_leaks
from fastmoco.evaluate.splits import Splits, make_splits
from fastmoco.evaluate.targets import Target, make_target
from fastmoco.study.cell import digest
from fastmoco.study.cells import SECOND, evaluation_resize
from fastmoco.study.config import Data, Study
from fastmoco.study.store import Store
from fastmoco.train.images import fingerprint

# Test and validation images are the same for every seed, draw and method.
_SPLIT_SEED = 0


def listed(store: Store, data: Data) -> Path:
    """The file that lists the images of `data` with their splits, as the study began with them."""
    return store.data / f"{data.name}.csv"


def listed_for_pretraining(store: Store, data: Data) -> Path:
    """The file that lists the images that pretraining may see: all but the test images."""
    return store.data / f"{data.name}-pretrain.csv"


@dataclass(frozen=True)
class Prepared:
    """Images whose splits are made, and what identifies them."""

    manifest: Manifest
    print: dict[str, Any]

    def write(self, store: Store, data: Data) -> None:
        """Write both lists that the cells of `data` read."""
        write_manifest(listed(store, data), self.manifest)
        assert self.manifest.splits is not None
        write_manifest(listed_for_pretraining(store, data), self.manifest.select(self.manifest.splits != "test"))


def prepare(study: Study, data: Data) -> Prepared:
    """List and check the images of `data`, and split them.

    Raises UserError as `load_manifest`, `make_splits` and `make_target` do, naming the data, where an image has no
    class, and where splits leak without leave.
    """
    where = f"{study.file} [[data]] {data.name}"
    try:
        everything = load_manifest(
            data.images,
            data.labels,
            label=(data.label, *data.multilabel),
            file_column=data.file_column,
            patient_column=data.patient_column,
            split_column=data.split_column,
        )
        manifest = only_labelled(everything, list(everything.labels))
        if unknown := len(everything) - len(manifest):
            columns = ", ".join(manifest.labels)
            raise UserError(
                f"{show_count(unknown, 'image')} without a class in {columns}; in a study all have one: "
                f"fill in the empty cells of {data.labels}, or leave those rows out"
            )
        # Leaks are told as a whole, below.
        splits = make_splits(manifest, data.label, seed=_SPLIT_SEED, allow_leaks=True)
        target = make_target(manifest, data.label)
        second = make_target(manifest, data.multilabel, SECOND) if data.multilabel else None
        leave = f'write allow = ["{data.name}"] in the table [leaks]'
        refuse_leaks(manifest, splits, allowed=data.name in study.leaks.allow, leave=leave)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    names = np.full(len(manifest), "train", dtype="<U10")
    names[splits.validation], names[splits.test] = "validation", "test"
    whole = replace(manifest, splits=names)
    print_ = {
        **_identity(whole, target),
        **({SECOND: _of_target(second)} if second is not None else {}),
        "patients": _of_patients(manifest),
        "origin": splits.origin,
        **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
    }
    return Prepared(whole, print_)


class Context:
    """The images, splits and targets of `data` in a process that computes cells on `device`.

    `own` is what identifies them, as "data" of a cell's settings.
    """

    def __init__(self, study: Study, data: Data, store: Store, device: str, own: Mapping[str, Any]) -> None:
        self.study, self.data, self.store, self.device = study, data, store, device
        self._own = own
        self._resize = evaluation_resize(study, data)

    @cached_property
    def manifest(self) -> Manifest:
        """As `prepare` listed it: no image is checked again.

        Raises UserError where the list has become another than the cells are of.
        """
        columns = (self.data.label, *self.data.multilabel)
        file = listed(self.store, self.data)
        manifest = load_manifest(self.data.images, file, label=columns, progress=False)
        found = _identity(manifest, make_target(manifest, self.data.label))
        if other := [name for name, value in found.items() if self._own[name] != value]:
            said = " and the ".join(other)
            raise UserError(f"{file}: the {said} are not those that the study began with: start it again")
        return manifest

    @cached_property
    def splits(self) -> Splits:
        """Those that `prepare` made."""
        return make_splits(self.manifest, self.data.label, seed=_SPLIT_SEED, allow_leaks=True)

    @cached_property
    def groups(self) -> np.ndarray:
        """(n,) numbers that are equal for images of one patient."""
        return patient_groups(self.manifest.patients, len(self.manifest))

    @cached_property
    def target(self) -> Target:
        """What the label column says."""
        return make_target(self.manifest, self.data.label)

    @cached_property
    def second(self) -> Target:
        """The target of several labels."""
        return make_target(self.manifest, self.data.multilabel, SECOND)

    @cached_property
    def images(self) -> Images:
        """All of them, decoded."""
        images = load_images(self.manifest, self.data.size, resize=self._resize, workers=1, progress=False)
        return images.on(self.device)


def _identity(manifest: Manifest, target: Target) -> dict[str, str]:
    """What of `manifest`, its splits made, and of its `target` cells depend on."""
    assert manifest.splits is not None
    return {
        "images": _of_files(manifest),
        "splits": digest(manifest.splits.tolist()),
        "label": _of_target(target),
    }


def _of_patients(manifest: Manifest) -> str:
    """SHA-256 of which images are of one patient, and of whether that is known."""
    return digest([manifest.patients is not None, patient_groups(manifest.patients, len(manifest)).tolist()])


def _of_files(manifest: Manifest) -> str:
    """SHA-256 of the images' names, sizes in pixels and in bytes."""
    parts = hashlib.sha256(fingerprint(manifest).encode())
    if manifest.stamps is not None:
        parts.update(np.ascontiguousarray(manifest.stamps[:, 0]).tobytes())
    return parts.hexdigest()


def _of_target(target: Target) -> str:
    return digest([target.kind, target.class_names, target.values.tolist()])
