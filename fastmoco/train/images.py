"""The images of a run: found and checked when it begins, and the same ones when it goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np

from fastmoco.data.manifest import Manifest, load_manifest, refuse_inside
from fastmoco.data.manifest_file import MANIFEST, read_manifest_file, write_manifest
from fastmoco.data.quarantine import check_there
from fastmoco.data.stage import stage
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.classes import names_of
from fastmoco.train.config import Config


def find_images(config: Config, saved: Checkpoint | None, *, listed: bool = False) -> Manifest:
    """The images that `config` names, checked with the decoder that training will use.

    A run that goes on has those that it began with, by the list in its folder, which is not checked again: what has
    changed meanwhile is met, and replaced, when it is read. `listed`: another process of the run has just written that
    list. Raises ImagesGone where hardly any image is there.
    """
    stored = config.run.out / MANIFEST
    if listed and not stored.exists():
        raise UserError(f"{stored} is not seen here: --out has to name a folder that all machines of the run share")
    if not listed and (saved is None or not stored.exists()):
        manifest = _found(config)
        # A list that was made before is not checked image by image.
        check_there(manifest)
        return manifest
    data = config.data.data
    # As the names of its members, those of a single shard begin with the shard.
    root = data.parent if data.suffix.lower() == ".tar" and not data.is_dir() else data
    manifest = Manifest(root=root, **read_manifest_file(stored))
    if saved is not None and saved.meta.get("root") != root_of(manifest) and manifest.stamps is not None:
        # They may be copies, whose times say nothing.
        manifest = replace(manifest, stamps=np.stack([manifest.stamps[:, 0], np.zeros(len(manifest), int)], axis=1))
    check_there(manifest)
    return manifest


def list_images(config: Config, manifest: Manifest, saved: Checkpoint | None) -> None:
    """Write `manifest` to the folder of a run that begins, or that goes on from `saved` and has lost its list."""
    stored = config.run.out / MANIFEST
    if saved is None or not stored.exists():
        write_manifest(stored, manifest)


def refuse_others(config: Config, manifest: Manifest, saved: Checkpoint | None) -> None:
    """Raise UserError where `manifest` is not of the images that the run of `saved`, if any, began with."""
    if saved is not None and saved.meta["data"] != fingerprint(manifest, config):
        raise UserError(
            f"--resume: the images under {config.data.data} are not those that the run in {config.run.out} "
            "began with (files added, removed or of another size, pairs of other patients, or other classes); restore "
            "them or start another run"
        )


def staged(config: Config, manifest: Manifest) -> Manifest:
    """`manifest` on the disk that `config` wants it copied to, if any."""
    folder = config.data.stage
    if folder is None:
        return manifest
    refuse_inside(folder, "--stage", manifest)
    return stage(manifest, folder)


def refuse_out_inside(config: Config, manifest: Manifest) -> None:
    """Raise UserError where the run's folder lies among the images, whose next listing would hold its pictures."""
    refuse_inside(config.run.out, "--out", manifest)


def root_of(manifest: Manifest) -> str:
    """Where the images lie, whatever folder the run is started from."""
    return str(manifest.root.resolve())


def fingerprint(manifest: Manifest, config: Config | None = None) -> str:
    """A hash of the names and sizes of the images, in their order, and, where a run of `config` learns from them, of
    their patients, which make the pairs, or their classes."""
    digest = hashlib.sha256(json.dumps(manifest.files).encode())
    digest.update(np.ascontiguousarray(manifest.sizes).tobytes())
    if config is not None and config.data.pairs == "patient" and manifest.patients is not None:
        digest.update(json.dumps(manifest.patients.tolist()).encode())
    if config is not None and config.loss.objective == "supcon":
        digest.update(json.dumps(names_of(manifest).tolist()).encode())
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
