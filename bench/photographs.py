"""Pictures to load: drawn ones that compress as photographs do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 90
# What is loaded where there are no images of the user's: drawing as many takes longer than many a measurement.
COUNT, SIDE = 192, 512


def draw_photographs(folder: Path, count: int, side: int, *, seed: int = 0) -> int:
    """Write `count` JPEGs of `side` x `side` pixels to `folder`, always the same; return their mean size in bytes.

    Smooth structure at all scales, as in photographs (each octave half as strong as the one before), and mild grain: at
    quality 90 a picture of 512 pixels takes 60 to 100 KB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, side])
    paths = [folder / f"{i:04d}.jpg" for i in range(count)]
    for path in paths:
        Image.fromarray(_photograph(rng, side)).save(path, quality=QUALITY)
    return mean_bytes(paths)


def mean_bytes(paths: Sequence[Path]) -> int:
    """The mean size of files."""
    return round(float(np.mean([path.stat().st_size for path in paths])))


def _photograph(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    light = np.zeros((side, side), dtype=np.float32)
    colour = np.zeros((side, side, 3), dtype=np.float32)
    cells, strength = 2, 1.0
    while cells <= side // 4:
        light += strength * _stretched(rng.standard_normal((cells, cells), dtype=np.float32), side)
        if cells <= 16:
            # Colours change over larger distances than light does.
            for channel in range(3):
                colour[..., channel] += strength * _stretched(rng.standard_normal((cells, cells), np.float32), side)
        cells, strength = 2 * cells, 0.5 * strength
    image = 0.45 + 0.16 * rng.standard_normal() + 0.22 * light[..., None] + 0.1 * colour
    image += 0.025 * rng.standard_normal((side, side, 1), dtype=np.float32)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def _stretched(cells: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC))
