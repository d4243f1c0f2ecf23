"""Features of every image from every residual stage of a frozen encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.utils.data import DataLoader, Dataset

from fastmoco.data.manifest import Manifest
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.tracking import track


def evaluation_image(image: np.ndarray, *, size: int, resize: float = 1.0) -> Tensor:
    """(H, W, 3) uint8 or uint16 -> (3, size, size) float32 in [0, 1]: shorter side to round(resize * size), then the
    centre.

    Bilinear with antialias, torchvision's to the rounding of float32. Raises UserError where `resize` leaves less than
    `size`.
    """
    shorter = round(resize * size)
    if shorter < size:
        raise UserError(f"resize {resize} brings the shorter side to {shorter} pixels, less than the size {size}")
    white = 65535 if image.dtype == np.uint16 else 255
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float().mul_(1 / white)
    # As in torchvision, the longer side is rounded down, and the centre to even pixels.
    sides = [shorter * side // min(pixels.shape[1:]) for side in pixels.shape[1:]]
    resized = interpolate(pixels[None], sides, mode="bilinear", antialias=True)[0]
    top, left = (round((side - size) / 2) for side in sides)
    return resized[:, top : top + size, left : left + size]


def describe_input(size: int, resize: float) -> str:
    """What `evaluation_image` makes of an image, in words."""
    return f"{size}x{size} pixels, the centre of the image after its shorter side is resized to {round(resize * size)}"


class BadImage(BadFile):
    """Image `index` of the manifest cannot be had."""

    def __init__(self, index: int, file: str, reason: str) -> None:
        super().__init__(file, reason)
        # All as arguments, so that the exception survives being pickled on its way from a worker process.
        self.args = (index, file, reason)
        self.index = index


class _Images(Dataset[Tensor]):
    def __init__(self, manifest: Manifest, size: int, resize: float) -> None:
        self.manifest, self.size, self.resize = manifest, size, resize

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Tensor:
        try:
            image = self.manifest.decode(index)
        except BadFile as bad:
            raise BadImage(index, bad.file, bad.reason) from bad
        return evaluation_image(image, size=self.size, resize=self.resize)


def extract(
    encoder: Encoder,
    manifest: Manifest,
    *,
    size: int,
    resize: float = 1.0,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: bool = True,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, np.ndarray]:
    """Features of all n images of `manifest`, in its order, as float32 arrays by name.

    "stage1" to "stage4" (n, C_s): outputs of the residual stages, averaged over all positions. "final" (n,
    dim): the head's embedding, scaled to length 1; left out where the encoder has no head, as it would repeat
    stage 4.

    The encoder is moved to `device` and run in evaluation mode without gradients, under bfloat16 autocast
    where `precision` is "bf16" and in its own dtype otherwise; its modules are then put back in the modes
    they were in, and no random state is touched. `workers` counts loading processes; 0 loads in this one. No
    feature depends on it, nor (beyond rounding) on `batch_size`. `after_batch` is called after each.
    """
    # Without a generator of its own, a DataLoader draws from torch's global one, even to load in order.
    loader = DataLoader(
        _Images(manifest, size, resize),
        batch_size=batch_size,
        num_workers=workers,
        generator=torch.Generator(),
    )
    batches = track(loader, "extracting features", each=batch_size, images=len(manifest), progress=progress)
    return stage_features(encoder, batches, device=device, precision=precision, after_batch=after_batch)


def stage_features(
    encoder: Encoder,
    batches: Iterable[Tensor],
    *,
    device: torch.device | str,
    precision: str = "fp32",
    after_batch: Callable[[], None] | None = None,
) -> dict[str, np.ndarray]:
    """What `extract` returns, of `batches` (N, 3, H, W) of values in [0, 1] on any device, one after the other."""
    encoder.to(device)
    dtype = next(encoder.parameters()).dtype
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    parts: dict[str, list[Tensor]] = {}
    with evaluating(encoder), torch.no_grad(), autocast:
        for images in batches:
            batch = images.to(device, dtype, memory_format=torch.channels_last)
            embedding, stages = encoder(batch)
            for number, stage in enumerate(stages, start=1):
                parts.setdefault(f"stage{number}", []).append(stage.float().mean(dim=(2, 3)).cpu())
            if encoder.has_head:
                parts.setdefault("final", []).append(normalize(embedding.float()).cpu())
            if after_batch is not None:
                after_batch()
    return {name: torch.cat(rows).numpy() for name, rows in parts.items()}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule gets its own mode back, since some may be frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
