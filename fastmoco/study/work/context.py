"""What the cells of one set of images share: read once a process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.images import Images, load_images
from fastmoco.evaluate.leaks import find_leaks
from fastmoco.evaluate.splits import Splits, make_splits, patient_groups
from fastmoco.evaluate.targets import Target, make_target
from fastmoco.study.cell import digest
from fastmoco.study.cells import SECOND, pretrain_config
from fastmoco.study.config import Data, Study
from fastmoco.study.store import Store
from fastmoco.train.images import fingerprint

# Test and validation images are the same for every seed, draw and method.
_SPLIT_SEED = 0
_MOST_LISTED = 20


def listed(store: Store, data: Data) -> Path:
    """The file that lists the images of `data` with their splits, as the study began with them."""
    return store.data / f"{data.name}.csv"


def listed_for_pretraining(store: Store, data: Data) -> Path:
    """The file that lists the images that pretraining may see: all but the test images."""
    return store.data / f"{data.name}-pretrain.csv"


@dataclass(frozen=True)
class Prepared:
    """Images whose splits are made. `leaks` lists what is in two of them."""

    manifest: Manifest
    splits: Splits
    leaks: list[str]
    print: dict[str, Any]


def prepare(study: Study, data: Data, store: Store) -> Prepared:
    """List and check the images of `data`, split them, and write both lists that the cells read.

    Raises UserError as `load_manifest`, `make_splits` and `make_target` do, naming the data, and where splits leak
    without leave.
    """
    where = f"{study.file} [[data]] {data.name}"
    try:
        manifest = load_manifest(
            data.images,
            data.labels,
            label=(data.label, *data.multilabel),
            file_column=data.file_column,
            patient_column=data.patient_column,
            split_column=data.split_column,
        )
        # Leaks are told as a whole, below.
        splits = make_splits(manifest, data.label, seed=_SPLIT_SEED, allow_leaks=True)
        target = make_target(manifest, data.label)
        second = make_target(manifest, data.multilabel, SECOND) if data.multilabel else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    leaks = find_leaks(manifest, splits)
    if leaks and data.name not in study.leaks.allow:
        lines = [
            *leaks[:_MOST_LISTED],
            *([f"... and {len(leaks) - _MOST_LISTED} more"] if leaks[_MOST_LISTED:] else []),
        ]
        raise UserError(
            f"{where}: the splits leak, so scores would be too good:\n  "
            + "\n  ".join(lines)
            + f'\nmend the splits, or write allow = ["{data.name}"] in the table [leaks]'
        )
    names = np.full(len(manifest), "train", dtype="<U10")
    names[splits.validation], names[splits.test] = "validation", "test"
    whole = replace(manifest, splits=names)
    write_manifest(listed(store, data), whole)
    write_manifest(listed_for_pretraining(store, data), whole.select(names != "test"))
    print_ = {
        "images": _of_files(manifest),
        "splits": digest(names.tolist()),
        "label": _of_target(target),
        **({SECOND: _of_target(second)} if second is not None else {}),
        **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
    }
    return Prepared(whole, splits, leaks, print_)


class Context:
    """The images, splits and targets of `data` in a process that computes cells on `device`."""

    def __init__(self, study: Study, data: Data, store: Store, device: str) -> None:
        self.study, self.data, self.store, self.device = study, data, store, device
        resize = pretrain_config(study, data, "moco", Path(), Path()).views.resize
        self._resize = 1.0 if resize is None else resize

    @cached_property
    def manifest(self) -> Manifest:
        """As `prepare` listed it: nothing is checked again."""
        columns = (self.data.label, *self.data.multilabel)
        return load_manifest(self.data.images, listed(self.store, self.data), label=columns, progress=False)

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


def _of_files(manifest: Manifest) -> str:
    """SHA-256 of the images' names, sizes in pixels and in bytes."""
    parts = hashlib.sha256(fingerprint(manifest).encode())
    if manifest.stamps is not None:
        parts.update(np.ascontiguousarray(manifest.stamps[:, 0]).tobytes())
    return parts.hexdigest()


def _of_target(target: Target) -> str:
    return digest([target.kind, target.class_names, target.values.tolist()])
