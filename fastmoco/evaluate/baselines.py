"""Features that need no network: what a representation has to beat before it is worth anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from fastmoco.data.decode import eight_bits
from fastmoco.data.manifest import Manifest
from fastmoco.tracking import track


def colour_statistics(manifest: Manifest, *, workers: int = 0, progress: bool = False) -> np.ndarray:
    """(n, 21) float32: mean, standard deviation, percentiles 10, 25, 50, 75 and 90 of red, of green and of
    blue.

    Values are those of the whole image, in [0, 1]. `workers` is the number of threads (0: one a core); with `progress`
    it is shown how many are done.
    """

    def statistics(image: np.ndarray) -> np.ndarray:
        pixels = image.reshape(-1, 3) / np.iinfo(image.dtype).max
        rows = [pixels.mean(axis=0), pixels.std(axis=0), *np.percentile(pixels, (10, 25, 50, 75, 90), axis=0)]
        return np.stack(rows, axis=1).ravel()

    return _each(manifest, statistics, "colour statistics", workers, progress)


def gray_pixels(manifest: Manifest, *, side: int = 16, workers: int = 0, progress: bool = False) -> np.ndarray:
    """(n, side * side) float32: the whole image in gray (ITU-R 601), shrunk to `side` x `side`, in [0, 1]."""

    def pixels(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(eight_bits(image)).convert("L").resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(small, dtype=np.float32).ravel() / 255.0

    return _each(manifest, pixels, "gray pixels", workers, progress)


def _each(
    manifest: Manifest, function: Callable[[np.ndarray], np.ndarray], what: str, workers: int, progress: bool
) -> np.ndarray:
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        rows = pool.map(lambda i: function(manifest.decode(i)), range(len(manifest)))
        return np.stack(list(track(rows, what, total=len(manifest), progress=progress))).astype(np.float32)
