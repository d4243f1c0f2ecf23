"""Pictures to load: drawn ones that compress as photographs do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 90
# What is loaded where there are no images of the user's: drawing as many takes longer than many a measurement.
COUNT, SIDE = 192, 512
# Pictures whose random numbers are in memory at once.
AHEAD = 16


def draw_photographs(folder: Path, count: int, side: int, *, seed: int = 0) -> int:
    """Write `count` JPEGs of `side` x `side` pixels to `folder`, always the same; return their mean size in bytes.

    Smooth structure at all scales, as in photographs (each octave half as strong as the one before), and mild grain: at
    quality 90 a picture of 512 pixels takes 60 to 100 KB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, side])
    paths = [folder / f"{i:04d}.jpg" for i in range(count)]

    def draw(path: Path, numbers: Numbers) -> None:
        Image.fromarray(_photograph(numbers, side)).save(path, quality=QUALITY)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, count, AHEAD):
            some = paths[start : start + AHEAD]
            # Random numbers in the order of the pictures; the rest is the same whoever does it.
            list(pool.map(draw, some, [_numbers(rng, side) for _ in some]))
    return mean_bytes(paths)


def mean_bytes(paths: Sequence[Path]) -> int:
    """The mean size of files."""
    return round(float(np.mean([path.stat().st_size for path in paths])))


@dataclass(frozen=True)
class Numbers:
    """What is random in a picture. octaves: for each its cells of light, and those of three colours or of none."""

    octaves: list[list[np.ndarray]]
    brightness: float
    grain: np.ndarray


def _numbers(rng: np.random.Generator, side: int) -> Numbers:
    octaves = []
    cells = 2
    while cells <= side // 4:
        # Colours change over larger distances than light does.
        octaves.append([rng.standard_normal((cells, cells), np.float32) for _ in range(4 if cells <= 16 else 1)])
        cells *= 2
    return Numbers(octaves, rng.standard_normal(), rng.standard_normal((side, side, 1), np.float32))


def _photograph(numbers: Numbers, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    light = np.zeros((side, side), dtype=np.float32)
    colour = np.zeros((side, side, 3), dtype=np.float32)
    strength = 1.0
    for cells, *colours in numbers.octaves:
        light += strength * _stretched(cells, side)
        for channel, coloured in enumerate(colours):
            colour[..., channel] += strength * _stretched(coloured, side)
        strength *= 0.5
    image = 0.45 + 0.16 * numbers.brightness + 0.22 * light[..., None] + 0.1 * colour
    image += 0.025 * numbers.grain
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def _stretched(cells: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC))
