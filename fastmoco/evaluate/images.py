"""Images decoded once and kept in memory, for whatever goes over them many times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.draws import draw
from fastmoco.data.manifest import Manifest
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.evaluate.features import evaluation_image, stage_features
from fastmoco.models.encoder import Encoder
from fastmoco.ops.lists import NATIVE_DEVICES
from fastmoco.ops.views import make_views
from fastmoco.tracking import track

MOST_BYTES = 8 << 30
# Images decoded ahead of the one that is being shrunk.
_READ_AHEAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What an encoder sees of n images: `pixels` (n, size, size, 3) uint8, on the CPU or on a GPU.

    Each is the one of `features.evaluation_image`, rounded to 8 bits.
    """

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> int:
        """Side of each, in pixels."""
        return self.pixels.shape[1]

    def select(self, indices: np.ndarray) -> Images:
        """Images `indices` (m,), in that order, copied."""
        return Images(pixels=self.pixels[torch.from_numpy(indices).to(self.pixels.device)])

    def on(self, device: torch.device | str) -> Images:
        """The same on `device`: itself where they are there already."""
        return Images(pixels=self.pixels.to(device))

    def batches(self, *, batch_size: int = 64) -> Iterator[Tensor]:
        """All of them in order, (N, 3, size, size) float32 in [0, 1], N = batch_size but for the last."""
        for part in self.pixels.split(batch_size):
            yield part.permute(0, 3, 1, 2).float() / 255.0

    def features(
        self, encoder: Encoder, *, batch_size: int = 64, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> dict[str, np.ndarray]:
        """As `features.extract`, of these images."""
        return stage_features(encoder, self.batches(batch_size=batch_size), device=device, precision=precision)

    def views(self, indices: np.ndarray, views: ViewConfig, *, seed: int, epoch: int) -> Tensor:
        """One random view each of images `indices` (N,): (N, 3, size, size) float16 in [0, 1], channels-last.

        The draws are those of `data.draws.draw`, and depend on (seed, epoch, index) alone. `views.resize` counts for
        nothing: the images are resized already, and views are cut from them. They are made where the images are.
        """
        views = replace(views, size=self.size, resize=1.0)
        sizes = np.full((len(indices), 2), self.size)
        drawn = draw(views, seed=seed, epoch=epoch, indices=indices, view=0, sizes=sizes)
        # To the size that they have: nothing is to be done.
        drawn["resized"] = 0
        made = make_views(
            list(self.select(indices).pixels),
            drawn,
            size=self.size,
            blur_kernel=views.blur_kernel,
            threads=torch.get_num_threads(),
        )
        return made.permute(0, 3, 1, 2)


def views_device(device: torch.device | str) -> torch.device:
    """Where views for `device` are made: there, if an implementation made for it is built, otherwise on the CPU."""
    where = torch.device(device)
    return where if where.type in NATIVE_DEVICES else torch.device("cpu")


def load_images(
    manifest: Manifest,
    size: int,
    *,
    resize: float = 1.0,
    workers: int = 0,
    progress: bool = True,
    most_bytes: int = MOST_BYTES,
) -> Images:
    """Decode all n images of `manifest`: the shorter side to round(resize * size) pixels, then the centre.

    `workers` threads decode; 0: one a core. Raises BadFile for an image that cannot be read, and UserError where they
    would take more than `most_bytes` (8 GiB).
    """
    needed = len(manifest) * size * size * 3
    if needed > most_bytes:
        raise UserError(
            f"--size {size}: {len(manifest):,} images take {needed / 2**30:.1f} GiB of memory, more than the "
            f"{most_bytes / 2**30:.1f} GiB that are allowed; choose a smaller size, or list fewer images with --labels"
        )
    pixels = torch.empty((len(manifest), size, size, 3), dtype=torch.uint8)
    parts = range(0, len(manifest), _READ_AHEAD)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        shown = track(parts, "decoding images", each=_READ_AHEAD, images=len(manifest), progress=progress)
        for first in shown:
            some = range(first, min(first + _READ_AHEAD, len(manifest)))
            for i, image in zip(some, pool.map(manifest.decode, some), strict=True):
                values = evaluation_image(image, size=size, resize=resize)
                pixels[i] = values.mul(255.0).round_().clamp_(0.0, 255.0).permute(1, 2, 0).to(torch.uint8)
    return Images(pixels=pixels)
