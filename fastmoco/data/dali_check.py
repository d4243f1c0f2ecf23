"""Whether DALI decodes a file to the same pixels as `decode` does. Only `DaliCheck` needs DALI."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
# Two builds of libjpeg may round a colour differently by a step or two (the same build: by none). A wrong conversion,
# of CMYK say, is off by tens, in the mean too. Whatever is stored without loss must be equal.
_JPEG_GREATEST = 8
_JPEG_MEAN = 0.5


def dali_version() -> str | None:
    """The version of DALI that is installed, or None."""
    for package in _PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def may_be_read(data: bytes, image: np.ndarray) -> bool:
    """Whether it is worth asking DALI: it keeps 8 bits of a sample, and reads neither DICOM nor GIF."""
    return image.dtype == np.uint8 and not data.startswith(b"GIF8") and data[128:132] != b"DICM"


def agrees(data: bytes, image: np.ndarray, other: np.ndarray) -> bool:
    """Whether `other` is what `image` (H, W, 3) uint8 is, both decoded from `data`, as near as its format allows."""
    if other.shape != image.shape:
        return False
    if np.array_equal(other, image):
        return True
    if not data.startswith(b"\xff\xd8"):
        return False
    difference = np.abs(other.astype(np.int16) - image)
    return bool(difference.max() <= _JPEG_GREATEST and difference.mean() <= _JPEG_MEAN)


class DaliCheck:
    """Asks DALI's decoder on the CPU, with the options that training uses, `batch` files at once. For one thread."""

    def __init__(self, batch: int) -> None:
        # Imports torch and DALI, which whoever only asks for `dali_version` can do without.
        import torch

        from fastmoco.data.dali import DaliDecoder

        self._decoder = DaliDecoder(batch_size=batch, threads=1, device=torch.device("cpu"))

    def agreed(self, files: Sequence[tuple[bytes, np.ndarray]]) -> list[bool]:
        """Whether DALI decodes each of `files`, no more than the batch, to the pixels that are given beside it."""
        asked = [i for i, (data, image) in enumerate(files) if may_be_read(data, image)]
        found = [False] * len(files)
        if asked:
            self._decoder.submit([files[i][0] for i in asked])
            for i, other in zip(asked, self._decoder.result(), strict=True):
                found[i] = not isinstance(other, Exception) and agrees(*files[i], np.asarray(other))
        return found
