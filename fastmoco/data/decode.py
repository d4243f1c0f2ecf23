"""One file to one RGB array, with Pillow: the definition the other decoders are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})


def decode_rgb(path: Path) -> np.ndarray:
    """Decode `path` to (H, W, 3) uint8 with its EXIF rotation applied.

    16-bit gray is scaled to 8 bits (Pillow's own conversion would clip it to white); transparent pixels keep
    their colour, as alpha is dropped.

    Raises OSError, ValueError or SyntaxError, as Pillow does, where the file cannot be decoded.
    """
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        gray = np.asarray(upright).astype(np.float32) / 257.0
        return np.repeat(np.clip(np.rint(gray), 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(upright.convert("RGB"))
