"""The images of a run: found and checked when it begins, and the same ones when it goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import read_manifest_file, write_manifest
from fastmoco.data.stage import stage
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.config import Config

MANIFEST = "manifest.csv"
# So many of a moved data set's images are looked at before a run goes on with it.
_LOOKED_AT = 20


def find_images(config: Config, saved: Checkpoint | None) -> Manifest:
    """The images that `config` names, checked with the decoder that training will use.

    A run that goes on has those that it began with, by the list in its folder, which is not checked again: what has
    changed meanwhile is met, and replaced, when it is read. Raises UserError where there are none.
    """
    stored = config.run.out / MANIFEST
    if saved is None or not stored.exists():
        return _found(config)
    data = config.data.data
    # As the names of its members, those of a single shard begin with the shard.
    root = data.parent if data.suffix.lower() == ".tar" and not data.is_dir() else data
    manifest = Manifest(root=root, **read_manifest_file(stored))
    return manifest if saved.meta.get("root") == root_of(manifest) else _moved(manifest, config.run.out)


def list_images(config: Config, manifest: Manifest) -> None:
    """Write `manifest` to the folder of a run that begins."""
    write_manifest(config.run.out / MANIFEST, manifest)


def staged(config: Config, manifest: Manifest) -> Manifest:
    """`manifest` on the disk that `config` wants it copied to, if any."""
    return manifest if config.data.stage is None else stage(manifest, config.data.stage)


def root_of(manifest: Manifest) -> str:
    """Where the images lie, whatever folder the run is started from."""
    return str(manifest.root.resolve())


def fingerprint(manifest: Manifest) -> str:
    """A hash of the names and sizes of the images, in their order."""
    digest = hashlib.sha256(json.dumps(manifest.files).encode())
    digest.update(np.ascontiguousarray(manifest.sizes).tobytes())
    return digest.hexdigest()


def _found(config: Config) -> Manifest:
    data = config.data
    manifest = load_manifest(
        data.data,
        data.labels,
        label=data.label,
        file_column=data.file_column,
        patient_column=data.patient_column,
        split_column=data.split_column,
        decoder="dali" if data.loader == "dali" else "pillow",
    )
    return manifest if data.split is None else manifest.only_split(data.split)


def _moved(manifest: Manifest, run: Path) -> Manifest:
    """The manifest of images that have come to lie elsewhere: they may be copies, whose times say nothing."""
    assert manifest.stamps is not None
    times_unknown = replace(manifest, stamps=np.stack([manifest.stamps[:, 0], np.zeros(len(manifest), int)], axis=1))
    some = np.unique(np.linspace(0, len(manifest) - 1, _LOOKED_AT).astype(int))
    problems = []
    for index in some.tolist():
        try:
            times_unknown.read(index)
            return times_unknown
        except BadFile as bad:
            problems.append(str(bad))
    raise UserError(
        f"--resume: the images under {manifest.root} are not those that the run in {run} began with: of {len(some)} "
        f"looked for none is there, the first {problems[0]}; name the folder that they lie in, or start another run"
    )
