"""What a set of images is made of: sizes, formats, brightness, classes, and what should make its owner wary."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.data.manifest import Manifest
from fastmoco.data.store import BadFile
from fastmoco.tracking import track

# Of an image's gray values, whose greatest is 1: below that there is next to nothing to see.
NEARLY_EMPTY = 0.01
_READ_AHEAD = 64
_LISTED = 20


@dataclass(frozen=True)
class Look:
    """One image: its encoding, hashes of its bytes and of its pixels, and its pixels' moments.

    `format` and `mode` are Pillow's names; `bits` a channel. `mean` and `square` (3,) float64 are the means of red,
    green and blue and of their squares, in [0, 1]; `spread` the standard deviation of its gray values.
    """

    format: str
    mode: str
    bits: int
    file_hash: bytes
    pixel_hash: bytes
    mean: np.ndarray
    square: np.ndarray
    spread: float


def look_at(manifest: Manifest, index: int) -> Look | BadFile:
    """What image `index` looks like, or why it cannot be read."""
    try:
        data = manifest.read(index)
        pixels = manifest.decode_bytes(index, data)
    except BadFile as bad:
        return bad
    encoded = data if isinstance(data, bytes) else data.tobytes()
    bits = 8 * pixels.dtype.itemsize
    kind, mode = _kind(data) if isinstance(data, bytes) else ("array", "RGB" if _coloured(pixels) else "L")
    x = pixels.reshape(-1, 3).astype(np.float32) / float(2**bits - 1)
    return Look(
        format=kind,
        mode=mode,
        bits=bits,
        file_hash=_hash(encoded),
        pixel_hash=pixel_hash(pixels),
        mean=x.mean(0, dtype=np.float64),
        square=np.square(x).mean(0, dtype=np.float64),
        spread=float((x @ np.array([0.299, 0.587, 0.114], np.float32)).std(dtype=np.float64)),
    )


def pixel_hash(pixels: np.ndarray) -> bytes:
    """16 bytes that are alike for decoded images of the same shape, dtype and values alone."""
    return _hash(f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes())


def _hash(data: bytes) -> bytes:
    # Half of it tells a million images apart, and there is one of each for every image.
    return hashlib.sha256(data).digest()[:16]


def _kind(data: bytes) -> tuple[str, str]:
    """Format and mode by the header. What Pillow does not know, and yet was decoded, is DICOM."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return str(image.format), image.mode
    except (OSError, Image.DecompressionBombError):
        return "DICOM", "-"


def _coloured(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 0] != pixels[..., 1]).any() or (pixels[..., 0] != pixels[..., 2]).any())


def statistics(manifest: Manifest, *, workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """All of it as plain JSON values, from one reading of every image, by `workers` threads (0: one a core).

    Images are named by their files. Means and standard deviations are over all pixels of all images, each image
    counting the same, of values in [0, 1].
    """
    looks: list[Look | BadFile] = []
    threads = workers or os.cpu_count() or 1
    parts = range(0, len(manifest), _READ_AHEAD)
    numbers = track(parts, "looking at images", each=_READ_AHEAD, images=len(manifest), progress=progress)
    with ThreadPoolExecutor(threads) as pool:
        for first in numbers:
            some = range(first, min(first + _READ_AHEAD, len(manifest)))
            looks += pool.map(lambda i: look_at(manifest, i), some)
    seen = [(i, look) for i, look in enumerate(looks) if isinstance(look, Look)]
    height, width = manifest.sizes.T
    found: dict[str, Any] = {
        "images": len(manifest),
        "left out": [str(item) for item in manifest.skipped],
        "unreadable": [str(look) for look in looks if isinstance(look, BadFile)],
        "height": _spread(height),
        "width": _spread(width),
        "sizes": _counts(f"{h} x {w}" for h, w in manifest.sizes.tolist()),
        "formats": _counts(f"{look.format} {look.mode}, {look.bits} bits" for _, look in seen),
        "decoded by": {"DALI": int(manifest.dali.sum()), "host": int((~manifest.dali).sum())},
        "classes": {name: _classes(manifest, name) for name in manifest.labels},
        "patients": None if manifest.patients is None else len(set(manifest.patients.tolist())),
        "splits": None if manifest.splits is None else _counts(manifest.splits.tolist()),
        "patients in several splits": _straddling(manifest),
        "same file": _groups(manifest, [(look.file_hash, i) for i, look in seen]),
        "same pixels": _groups(manifest, [(look.pixel_hash, i) for i, look in seen]),
        "nearly empty": [manifest.files[i] for i, look in seen if look.spread < NEARLY_EMPTY],
    }
    # Of an array's rows only the whole file's is known.
    if manifest.stamps is not None and manifest.root.suffix.lower() != ".npz":
        found["bytes"] = _spread(manifest.stamps[:, 0])
    if seen:
        mean = np.mean([look.mean for _, look in seen], axis=0)
        square = np.mean([look.square for _, look in seen], axis=0)
        found["mean"] = [round(float(value), 4) for value in mean]
        found["std"] = [round(float(value), 4) for value in np.sqrt(np.maximum(square - mean**2, 0))]
    return found


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"least": int(values.min()), "median": int(np.median(values)), "greatest": int(values.max())}


def _counts(values: Iterable[str]) -> dict[str, int]:
    """How often each comes, the most frequent first."""
    return dict(Counter(values).most_common())


def _classes(manifest: Manifest, name: str) -> dict[str, int]:
    numbers = np.bincount(manifest.labels[name], minlength=len(manifest.class_names[name]))
    return dict(zip(manifest.class_names[name], numbers.tolist(), strict=True))


def _straddling(manifest: Manifest) -> list[str] | None:
    """Patients whose images are in more than one split: a test on them would not be of new patients."""
    if manifest.patients is None or manifest.splits is None:
        return None
    splits: dict[str, set[str]] = defaultdict(set)
    for patient, split in zip(manifest.patients.tolist(), manifest.splits.tolist(), strict=True):
        splits[patient].add(split)
    return sorted(patient for patient, own in splits.items() if len(own) > 1)


def _groups(manifest: Manifest, hashes: Sequence[tuple[bytes, int]]) -> list[list[str]]:
    """Files that share a hash, each group once."""
    groups: dict[bytes, list[str]] = defaultdict(list)
    for digest, i in hashes:
        groups[digest].append(manifest.files[i])
    return [files for files in groups.values() if len(files) > 1]


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table: what, and what was found."""
    lines = [("images", f"{found['images']:,}")]
    for what in ("height", "width", "bytes"):
        if what in found:
            least, median, greatest = (found[what][k] for k in ("least", "median", "greatest"))
            lines.append((what, f"{least:,} to {greatest:,}, median {median:,}"))
    lines += [
        ("formats", _several(found["formats"])),
        ("decoded by", _several(found["decoded by"])),
    ]
    if "mean" in found:
        lines += [(f"{what} of R, G, B", ", ".join(f"{v:.3f}" for v in found[what])) for what in ("mean", "std")]
    for name, classes in found["classes"].items():
        named = {known or "(no class)": count for known, count in classes.items()}
        lines.append((f"label {name}", _several(named)))
    if found["patients"] is not None:
        lines.append(("patients", f"{found['patients']:,}"))
    if found["splits"] is not None:
        lines.append(("splits", _several(found["splits"])))
    for what in ("left out", "unreadable", "nearly empty"):
        lines.append((what, _named(found[what])))
    if found["patients in several splits"] is not None:
        lines.append(("patients in several splits", _named(found["patients in several splits"])))
    for what in ("same file", "same pixels"):
        lines.append((what, _named([" = ".join(group) for group in found[what]])))
    return lines


def _several(counts: dict[str, int]) -> str:
    shown = [f"{name}: {count:,}" for name, count in list(counts.items())[:_LISTED]]
    return "; ".join(shown) + (f"; {len(counts) - _LISTED} more" if len(counts) > _LISTED else "")


def _named(items: Sequence[str]) -> str:
    """How many, and the first few."""
    return f"{len(items):,}" + (f", the first {items[0]}" if items else "")
