"""The images of a run: found and checked when it begins, and the same ones when it goes on."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.train.config import Config


def find_images(config: Config) -> Manifest:
    """The images that `config` names, checked with the decoder that training will use."""
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


def fingerprint(manifest: Manifest) -> str:
    """A hash of the names and sizes of the images, in their order."""
    digest = hashlib.sha256(json.dumps(manifest.files).encode())
    digest.update(np.ascontiguousarray(manifest.sizes).tobytes())
    return digest.hexdigest()
