"""Drawn images with two labels, of which one can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 90
# Redder against greener at the same luminance: gray pixels must not see it.
TINT = np.array([24.0, -24.0 * 0.299 / 0.587, 0.0])


def draw_tinted(root: Path) -> Path:
    """90 images of 18 patients, 41x30 to 37x52 pixels: "warm" is their tint, "coin" nothing at all."""
    rng = np.random.default_rng(0)
    lines = ["file,patient,split,warm,coin"]
    for i in range(IMAGES):
        warm, coin = int(rng.integers(2)), int(rng.integers(2))
        height, width = (41, 30) if i % 2 else (37, 52)
        pixels = rng.normal(128, 40, (height, width, 3)) + TINT * (2 * warm - 1)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,p{i // 5},{'test' if i >= 60 else 'train'},{warm},{coin}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root
