"""Views made with torchvision, one image at a time: the definition, and the loader where DALI is not installed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch.utils.data import DataLoader, Dataset

from fastmoco.data.draws import BRIGHTNESS, CONTRAST, SATURATION, Draws, draw
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError


def make_view(image: np.ndarray, views: ViewConfig, draws: Draws, i: int) -> torch.Tensor:
    """The view that row `i` of `draws` makes of `image` (H, W, 3) uint8: (3, size, size) float32 in [0, 1]."""
    x = torch.tensor(image).permute(2, 0, 1).float().div_(255.0)
    if draws.resized is not None:
        x = F.resize(x, draws.resized[i].tolist(), antialias=True)
    top, left, height, width = draws.window[i].tolist()
    x = x[:, top : top + height, left : left + width]
    if views.crop_scale is not None:
        x = F.resize(x, [views.size, views.size], antialias=True)
    for operation in draws.order[i]:
        x = _jitter(x, operation, draws, i)
    if draws.gray[i]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if draws.sigma[i] > 0:
        x = F.gaussian_blur(x, [views.blur_kernel] * 2, [float(draws.sigma[i])] * 2)
    if draws.angle[i] != 0:
        x = F.rotate(x, float(draws.angle[i]), interpolation=F.InterpolationMode.BILINEAR)
    return F.horizontal_flip(x) if draws.flip[i] else x


def _jitter(x: torch.Tensor, operation: int, draws: Draws, i: int) -> torch.Tensor:
    """One colour operation; a neutral factor leaves the image untouched, as it would up to rounding."""
    function: Callable[[torch.Tensor, float], torch.Tensor]
    if operation == BRIGHTNESS:
        function, factor, neutral = F.adjust_brightness, draws.brightness[i], 1.0
    elif operation == CONTRAST:
        function, factor, neutral = F.adjust_contrast, draws.contrast[i], 1.0
    elif operation == SATURATION:
        function, factor, neutral = F.adjust_saturation, draws.saturation[i], 1.0
    else:
        function, factor, neutral = F.adjust_hue, draws.hue[i], 0.0
    return x if factor == neutral else function(x, float(factor))


class _Batches(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | UserError]):
    """Item `t` is micro-batch t: two (N, size, size, 3) float16 tensors and the sample indices (N,) int64.

    A UserError is returned and not raised, because DataLoader would bury its message in a traceback.
    """

    def __init__(self, manifest: Manifest, views: ViewConfig, order: Order) -> None:
        self.manifest, self.views, self.order = manifest, views, order

    def __getitem__(self, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | UserError:
        try:
            return self._make(t)
        except UserError as error:
            return error

    def _make(self, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        epoch, indices = self.order.batch(t)
        sizes = self.manifest.sizes[indices]
        draws = [
            draw(self.views, seed=self.order.seed, epoch=epoch, indices=indices, view=view, sizes=sizes)
            for view in (0, 1)
        ]
        shape = (len(indices), self.views.size, self.views.size, 3)
        q, k = torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.float16)
        for i, index in enumerate(indices):
            image = self.manifest.decode(int(index))
            for batch, made in zip((q, k), draws, strict=True):
                batch[i].copy_(make_view(image, self.views, made, i).permute(1, 2, 0))
        return q, k, torch.from_numpy(indices)


def torchvision_batches(
    manifest: Manifest, views: ViewConfig, order: Order, *, start: int, stop: int, workers: int
) -> Generator[tuple[torch.Tensor, torch.Tensor, np.ndarray], None, None]:
    """Yield micro-batches `start` to `stop` - 1 as (q, k, indices), made by `workers` processes (0: in this one).

    q and k are (N, size, size, 3) float16 in [0, 1]; indices (N,) int64. Raises UserError naming the file where one
    cannot be decoded.
    """
    loader = DataLoader(
        _Batches(manifest, views, order),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        worker_init_fn=_start_worker,
        # Of its own, so that the process's random state does not depend on how often a loader was made.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        q, k, indices = batch
        yield q, k, indices.numpy()


def _start_worker(_: int) -> None:
    # Ctrl-C, and the SIGTERM of a cluster, reach the whole process group; the trainer alone answers them, and stops
    # the workers when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
