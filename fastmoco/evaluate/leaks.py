"""What training, validation and test images share that they should not: patients, and images."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.manifest_file import MANIFEST, is_manifest_file, read_manifest_file
from fastmoco.data.stats import pixel_hash
from fastmoco.errors import UserError
from fastmoco.evaluate.splits import Splits
from fastmoco.models.weights import CONFIG

_LISTED = 20
# Name, height, width and bytes: many sets of images have a 000.png.
Image = tuple[str, int, int, int]


def find_leaks(manifest: Manifest, splits: Splits, *, workers: int = 0) -> list[str]:
    """A line for each patient with images in two or three parts, then one for each image that lies in several.

    Images are the same where they have the same pixels once decoded, by hash, whatever their names and encodings; one
    that was cropped or compressed anew is not found. `workers` threads decode (0: one a core), as every image is read.
    An empty list: nothing was found. Raises BadFile for an image that cannot be read.
    """
    part = np.full(len(manifest), "", dtype="U10")
    for name in ("train", "validation", "test"):
        part[getattr(splits, name)] = name
    return _patients(manifest, part) + _duplicates(manifest, part, workers or os.cpu_count() or 1)


def refuse_leaks(manifest: Manifest, splits: Splits, *, allowed: bool, leave: str = "pass --allow-leaks") -> list[str]:
    """`find_leaks`; raises UserError with the first of them where there are any, unless they are `allowed`.

    `leave` says there how to allow them.
    """
    found = find_leaks(manifest, splits)
    if found and not allowed:
        more = [f"and {len(found) - _LISTED:,} more"] if len(found) > _LISTED else []
        listed = "\n  ".join(found[:_LISTED] + more)
        raise UserError(
            f"the splits leak, so that scores would be too good:\n  {listed}\nMend the split column, take one of each "
            f"pair of images out, or {leave}"
        )
    return found


def _patients(manifest: Manifest, part: np.ndarray) -> list[str]:
    if manifest.patients is None:
        return []
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for patient, where in zip(manifest.patients.tolist(), part.tolist(), strict=True):
        # An unnamed patient is another for each image.
        if patient and where:
            counts[patient][where] += 1
    lines = []
    for patient, own in sorted(counts.items()):
        if len(own) > 1:
            lines.append(f"patient {patient}: " + ", ".join(f"{n} in {where}" for where, n in sorted(own.items())))
    return lines


def _duplicates(manifest: Manifest, part: np.ndarray, workers: int) -> list[str]:
    used = np.flatnonzero(part != "").tolist()
    with ThreadPoolExecutor(workers) as pool:
        hashes = list(pool.map(lambda i: pixel_hash(manifest.decode(i)), used))
    same: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in zip(used, hashes, strict=True):
        same[digest].append(i)
    return [
        "same pixels: " + ", ".join(f"{manifest.files[i]} ({part[i]})" for i in images)
        for images in same.values()
        if len({str(part[i]) for i in images}) > 1
    ]


def pretrained_on(run: Path) -> frozenset[Image]:
    """The images that the run in folder `run` was trained on, as far as it says them."""
    listed = run / MANIFEST
    # Beside an exported encoder, where there is no run, a file of that name may be anything's.
    if not (run / CONFIG).is_file() or not is_manifest_file(listed):
        return frozenset()
    try:
        found = read_manifest_file(listed)
    except UserError:
        # Scores do not depend on it.
        return frozenset()
    return frozenset(_images(found["files"], found["sizes"], found["stamps"]))


def seen_before(images: frozenset[Image], manifest: Manifest, splits: Splits) -> tuple[str, ...]:
    """A line on how many test images are among `images`, which an encoder was pretrained on; empty for none.

    Where none is by its name, those count whose height, width and bytes are there, as those of packed images are, if
    they are most and hardly two test images have the same.
    """
    if manifest.stamps is None:
        return ()
    test = manifest.select(splits.test)
    assert test.stamps is not None
    own = list(_images(test.files, test.sizes, test.stamps))
    seen = sum(image in images for image in own)
    if not seen:
        sizes = {image[1:] for image in images}
        alike = sum(image[1:] in sizes for image in own)
        if 2 * alike < len(own) or 2 * len({image[1:] for image in own}) < len(own) or not own:
            return ()
        return (
            f"{alike} of the {len(own)} test images have the height, width and bytes of images that were pretrained "
            f"on, under other names in the run's {MANIFEST}: they may be the same, packed or in another folder.",
        )
    named = "" if manifest.splits is not None else ", which wants a split column in --labels,"
    return (
        f"{seen} of the {len(splits.test)} test images were pretrained on, without their labels, by names and sizes in "
        f"the run's {MANIFEST}; pretrain with --split train{named} to keep them apart.",
    )


def _images(files: Sequence[str], sizes: np.ndarray, stamps: np.ndarray) -> Iterator[Image]:
    for file, (height, width), size in zip(files, sizes.tolist(), stamps[:, 0].tolist(), strict=True):
        yield file, height, width, size
