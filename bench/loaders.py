"""Ways to get batches of view pairs from files: fastmoco's loaders, and those that others use for the same views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.turns import Missing
from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError

Pair = tuple[Tensor, Tensor]
Opened = AbstractContextManager[Iterator[Pair]]

# More than any turn takes: no epoch's end, at which workers would start anew, falls into one.
_ENDLESS = 10**6


@dataclass(frozen=True)
class Setting:
    """What is loaded: MoCo v2's views, of `views.size` pixels, of the images in `manifest`.

    `workers` is the number of threads, or of processes in loaders that use processes. `device` is where the batches are
    wanted.
    """

    manifest: Manifest
    views: ViewConfig
    batch_size: int
    workers: int
    device: str = "cpu"

    def order(self) -> Order:
        """The order in which fastmoco's loaders take the images."""
        return Order(len(self.manifest), self.batch_size, seed=0)


def read_manifest(folder: Path) -> Manifest:
    """The images of `folder` that our fastest loader here can read. Raises UserError as `load_manifest` does."""
    return load_manifest(folder, decoder="dali" if dali_installed() else "pillow", progress=False)


def read_generated(folder: Path) -> Manifest:
    """As `read_manifest`, of generated images. Raises UserError where --generated is no folder."""
    if not folder.is_dir():
        raise UserError(f"--generated {folder}: no such folder; without it they are drawn")
    return read_manifest(folder)


def fastmoco_loader(kind: LoaderKind) -> Callable[[Setting], Opened]:
    """fastmoco's own, of one kind. Raises Missing where DALI is asked for and not installed."""

    def opener(setting: Setting) -> Opened:
        if kind == "dali" and not dali_installed():
            raise Missing("NVIDIA DALI is not installed")
        return _fastmoco(kind, setting)

    return opener


@contextmanager
def _fastmoco(kind: LoaderKind, setting: Setting) -> Iterator[Iterator[Pair]]:
    with make_loader(
        kind,
        setting.manifest,
        setting.views,
        setting.order(),
        start=0,
        stop=_ENDLESS,
        workers=setting.workers,
        device=setting.device,
    ) as batches:
        yield ((batch.q, batch.k) for batch in batches)


class _Twice(Dataset[Pair]):
    """Two draws of `transform` of each image that `read` returns; float tensors (3, size, size) in [0, 1]."""

    def __init__(self, manifest: Manifest, read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> None:
        self.paths = [str(manifest.path(i)) for i in range(len(manifest))]
        self.read, self.transform = read, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        image = self.read(self.paths[index])
        return self.transform(image), self.transform(image)


def moco_transforms(views: ViewConfig, *, tensors: bool) -> Callable[[Any], Tensor]:
    """torchvision's transforms.v2 for `views` (no first resize, no rotation), of PIL images or of uint8 `tensors`."""
    from torchvision.transforms import v2

    last = [v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(
        [
            v2.RandomResizedCrop(views.size, views.crop_scale, antialias=True),
            v2.RandomApply([v2.ColorJitter(*views.jitter)], p=views.jitter_p),
            v2.RandomGrayscale(views.gray_p),
            v2.RandomApply([v2.GaussianBlur(views.blur_kernel, views.blur_sigma)], p=views.blur_p),
            v2.RandomHorizontalFlip(views.flip_p),
            *(last if tensors else [v2.ToImage(), *last]),
        ]
    )


def torchvision_pil(setting: Setting) -> Opened:
    """Pillow decodes and torchvision transforms the PIL image: the recipe of most training code."""
    return _worked(setting, _Twice(setting.manifest, _pil, moco_transforms(setting.views, tensors=False)))


def torchvision_flushed(setting: Setting) -> Opened:
    """The same where workers round denormals to zero, which nobody's example does: the blur's outermost weights are
    denormal below a sigma of about 1.2, and some processors multiply such numbers a hundred times as slowly."""
    dataset = _Twice(setting.manifest, _pil, moco_transforms(setting.views, tensors=False))
    return _worked(setting, dataset, worker_init=_flush_denormals)


def torchvision_uint8(setting: Setting) -> Opened:
    """torchvision decodes to a uint8 tensor and transforms it, as its documentation advises for speed."""
    return _worked(setting, _Twice(setting.manifest, _uint8, moco_transforms(setting.views, tensors=True)))


def lightly(setting: Setting) -> Opened:
    """lightly's dataset and MoCo v2 transform in torch's loader, as in its examples; without the normalisation."""
    try:
        from lightly.data import LightlyDataset
        from lightly.transforms import MoCoV2Transform
    except ModuleNotFoundError:
        raise Missing("lightly is not installed") from None
    views = setting.views
    assert views.crop_scale is not None
    transform = MoCoV2Transform(
        input_size=views.size,
        cj_prob=views.jitter_p,
        min_scale=views.crop_scale[0],
        random_gray_scale=views.gray_p,
        gaussian_blur=views.blur_p,
        sigmas=views.blur_sigma,
        hf_prob=views.flip_p,
        normalize=None,
    )
    dataset = LightlyDataset(str(setting.manifest.root), transform=transform)
    return _worked(setting, dataset, lambda batch: (batch[0][0], batch[0][1]))


@contextmanager
def _worked(
    setting: Setting,
    dataset: Dataset[Any],
    pair: Callable[[Any], Pair] = lambda batch: (batch[0], batch[1]),
    worker_init: Callable[[int], None] | None = None,
) -> Iterator[Iterator[Pair]]:
    """`dataset` in torch's DataLoader with worker processes; without end."""
    batches = iter(
        endless(
            dataset,
            setting.batch_size,
            setting.workers,
            worker_init_fn=worker_init,
            pin_memory=setting.device != "cpu",
        )
    )

    def pairs() -> Iterator[Pair]:
        for batch in batches:
            q, k = pair(batch)
            yield q.to(setting.device, non_blocking=True), k.to(setting.device, non_blocking=True)

    yield pairs()


def endless(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    """torch's DataLoader over epoch after epoch in random order, of which it knows nothing: no batch waits for workers
    that start anew."""
    sampler = RandomSampler(dataset, num_samples=_ENDLESS)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True, num_workers=workers, **options)


def _flush_denormals(_: int) -> None:
    torch.set_flush_denormal(True)


def _pil(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _uint8(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


LOADERS: dict[str, Callable[[Setting], Opened]] = {
    "fastmoco dali": fastmoco_loader("dali"),
    "fastmoco pillow": fastmoco_loader("pillow"),
    "torchvision, PIL": torchvision_pil,
    "torchvision, PIL, denormals flushed": torchvision_flushed,
    "torchvision, uint8": torchvision_uint8,
    "lightly": lightly,
}
OURS = ("fastmoco dali", "fastmoco pillow")
BASELINE = "torchvision, PIL"
# Not timed: what ours are held to, given the same draws.
DEFINITION = fastmoco_loader("torchvision")


def statistics(opener: Callable[[Setting], Opened], setting: Setting, pairs: int) -> np.ndarray:
    """(2 * pairs or some more, 6) float64: each view's mean and standard deviation of red, green and blue."""
    rows: list[Tensor] = []
    with opener(setting) as items:
        while sum(map(len, rows)) < 2 * pairs:
            for view in next(items):
                values = view.float()
                rows.append(torch.cat([values.mean((2, 3)), values.std((2, 3))], dim=1).double())
    return torch.cat(rows).cpu().numpy()


def first_views(opener: Callable[[Setting], Opened], setting: Setting, batches: int) -> np.ndarray:
    """The first views, (2 * batches * N, 3, size, size) float32."""
    with opener(setting) as items:
        return torch.cat([view.float().cpu() for _ in range(batches) for view in next(items)]).numpy()
