"""What DALI makes of files, asked before training does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmoco.data.dali import DaliDecoder, Undecodable

_CHECKED_AT_ONCE = 64


def dali_decodable(paths: Sequence[Path]) -> dict[Path, tuple[int, int] | str]:
    """Decode each file as training will: its height and width after EXIF rotation, or why DALI cannot decode it."""
    verdicts: dict[Path, tuple[int, int] | str] = {}
    decoder = DaliDecoder(batch_size=_CHECKED_AT_ONCE, threads=2, device=torch.device("cpu"))
    for i in range(0, len(paths), _CHECKED_AT_ONCE):
        readable: dict[Path, bytes] = {}
        for path in paths[i : i + _CHECKED_AT_ONCE]:
            try:
                readable[path] = path.read_bytes()
            except OSError as error:
                verdicts[path] = f"cannot be read ({error.strerror})"
        if readable:
            decoder.submit(list(readable.values()))
            for path, image in zip(readable, decoder.result(), strict=True):
                verdicts[path] = str(image) if isinstance(image, Undecodable) else (image.shape[0], image.shape[1])
    return {path: verdicts[path] for path in paths}
