"""Batches of view pairs for training, from DALI or from torchvision, the same images and draws from either."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from fastmoco.data.dali import dali_batches, dali_installed, require_dali
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.reference import torchvision_batches
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError

LoaderKind = Literal["auto", "dali", "torchvision"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Two views `q` and `k` of the images `indices` (N,) int64.

    Each is (N, 3, size, size) float16 in [0, 1], channels_last: its memory is dense NHWC.
    """

    q: torch.Tensor
    k: torch.Tensor
    indices: np.ndarray


class Loader(Iterator[Batch]):
    """An iterator over micro-batches that gives its workers back on `close()` or at the end of a `with` block."""

    def __init__(
        self, batches: Generator[tuple[torch.Tensor, torch.Tensor, np.ndarray], None, None], length: int
    ) -> None:
        self._batches = batches
        self._left = length

    def __len__(self) -> int:
        """Micro-batches still to come."""
        return self._left

    def __next__(self) -> Batch:
        q, k, indices = next(self._batches)
        self._left -= 1
        return Batch(q.permute(0, 3, 1, 2), k.permute(0, 3, 1, 2), indices)

    def close(self) -> None:
        """Stop the workers and free their buffers. May be called more than once."""
        self._batches.close()
        self._left = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_loader(
    kind: LoaderKind,
    manifest: Manifest,
    views: ViewConfig,
    order: Order,
    *,
    start: int,
    stop: int,
    workers: int,
) -> Loader:
    """Load micro-batches `start` to `stop` - 1 of `order`.

    `kind` "dali" uses NVIDIA DALI with `workers` threads, "torchvision" that many processes (0: none, the views
    are made where the batch is asked for), and "auto" DALI where it is installed. What a batch holds depends on the
    seed of `order` and on the batch's number, not on `start`, `stop` or `workers`.

    Raises UserError where `order` was made for another number of images, where DALI is asked for and not
    installed, and, while iterating, for a file that cannot be decoded.
    """
    if order.samples != len(manifest):
        raise UserError(f"the order is of {order.samples} images, but the manifest lists {len(manifest)}")
    if not 0 <= start <= stop or workers < 0:
        raise UserError(f"needs 0 <= start <= stop and workers >= 0, not {start}, {stop}, {workers}")
    if kind == "dali":
        require_dali()
    if kind == "dali" or (kind == "auto" and dali_installed()):
        batches = dali_batches(manifest, views, order, start=start, stop=stop, threads=max(workers, 1))
    else:
        batches = torchvision_batches(manifest, views, order, start=start, stop=stop, workers=workers)
    return Loader(batches, stop - start)
