"""Views made with NVIDIA DALI from the draws that `reference` takes: one decode for both views, fp16 NHWC out."""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.data.draws import CONTRAST, HUE, SATURATION, Draws, draw
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig, centre_windows
from fastmoco.errors import UserError

_CHECKED_AT_ONCE = 64


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Raise UserError, saying what to install, where NVIDIA DALI is missing."""
    if not dali_installed():
        raise UserError(
            "loader dali: NVIDIA DALI is not installed; pip install 'fastmoco[dali-cuda13]' (or "
            "'fastmoco[dali-cuda12]' for CUDA 12), or choose the torchvision loader"
        )


def dali_batches(
    manifest: Manifest, views: ViewConfig, order: Order, *, start: int, stop: int, threads: int
) -> Generator[tuple[torch.Tensor, torch.Tensor, np.ndarray], None, None]:
    """Yield micro-batches `start` to `stop` - 1 as (q, k, indices), made by `threads` CPU threads.

    q and k are (N, size, size, 3) float16 in [0, 1]; indices (N,) int64. Raises UserError naming a file
    that cannot be decoded or whose size is not the manifest's.
    """
    from fastmoco.data.dali_graph import view_pipeline

    ahead: deque[np.ndarray] = deque()

    def inputs(t: int) -> dict[str, Any]:
        epoch, indices = order.batch(t)
        ahead.append(indices)
        return graph_inputs(manifest, views, seed=order.seed, epoch=epoch, indices=indices)

    def source(step: int) -> list[Any]:
        if start + step >= stop:
            raise StopIteration
        return list(inputs(start + step).values())

    names = list(inputs(start))
    ahead.clear()
    pipeline = view_pipeline(views, source, names, batch_size=order.batch_size, threads=threads)
    for _ in range(start, stop):
        try:
            *made, shapes = pipeline.run()
        except RuntimeError as error:
            raise _explained(error, manifest, np.concatenate(ahead)) from error
        indices = ahead.popleft()
        if not np.array_equal(shapes.as_array()[:, :2], manifest.sizes[indices]):
            raise _explained(None, manifest, indices)
        q, k = (torch.from_dlpack(view.as_tensor()) for view in made)
        yield q, k, indices


def graph_inputs(
    manifest: Manifest, views: ViewConfig, *, seed: int, epoch: int, indices: np.ndarray
) -> dict[str, Any]:
    """What the operator graph is fed for one batch: paths, regions and draws, by name, each with N rows.

    Names that begin with "q_" and "k_" belong to one view. What the recipe leaves out is not among them.
    """
    from fastmoco.data.dali_graph import path_bytes

    sizes = manifest.sizes[indices]
    given: dict[str, Any] = {"path": path_bytes([manifest.path(int(i)) for i in indices])}
    for view, which in enumerate("qk"):
        draws = draw(views, seed=seed, epoch=epoch, indices=indices, view=view, sizes=sizes)
        corner = np.zeros((len(indices), 2), dtype=np.int64)
        if draws.resized is not None:
            region = centre_windows(views, draws.resized)
            corner = region[:, :2]
            scale = sizes / draws.resized
            given["region_start"] = (corner * scale).astype(np.float32)
            given["region_end"] = ((corner + views.size) * scale).astype(np.float32)
        given |= {f"{which}_{name}": value for name, value in _view_inputs(views, draws, corner).items()}
    return given


def _view_inputs(views: ViewConfig, draws: Draws, corner: np.ndarray) -> dict[str, np.ndarray]:
    """One view's inputs; `corner` (N, 2) is where the image that the graph crops begins in resized coordinates."""
    given: dict[str, np.ndarray] = {}
    if views.crop_scale is not None:
        given["start"] = (draws.window[:, :2] - corner).astype(np.int32)
        given["shape"] = draws.window[:, 2:].astype(np.int32)
    if views.jitters:
        given |= _linear_inputs(draws)
        if views.jitter[HUE] > 0:
            given |= _hue_inputs(views, draws)
    if views.gray_p > 0:
        given["gray"] = draws.gray
    if views.blurs:
        kernel = _blur_kernels(views, draws.sigma)
        given["blurred"] = draws.sigma > 0
        given["kernel_y"] = kernel[:, :, None]
        given["kernel_x"] = kernel[:, None, :]
    if views.rotation > 0:
        given["rotation"] = _rotations(views.size, draws.angle)
    if views.flip_p > 0:
        given["flip"] = draws.flip.astype(np.int32)
    return given


def _linear_inputs(draws: Draws) -> dict[str, np.ndarray]:
    """The linear colour operations in their order, in slots "before" and "after" the hue; some slots stay unused."""
    factors = np.stack([draws.brightness, draws.contrast, draws.saturation, np.ones_like(draws.hue)], axis=1)
    factor = np.take_along_axis(factors, draws.order, axis=1)
    rest = 1.0 - factor
    to_gray = np.where(draws.order == SATURATION, rest, 0.0)
    to_mean = np.where(draws.order == CONTRAST, rest, 0.0)
    used = factor != 1.0
    place = np.argmax(draws.order == HUE, axis=1)[:, None]
    given: dict[str, np.ndarray] = {}
    for slot in range(3):
        # Operation `slot` lies before the hue if the hue comes later, and `slot` + 1 is after it if it came sooner.
        for side, column, here in (("before", slot, slot < place), ("after", slot + 1, slot + 1 > place)):
            given[f"{side}{slot}_used"] = used[:, column] & here[:, 0]
            given[f"{side}{slot}_factor"] = factor[:, column].astype(np.float32)
            given[f"{side}{slot}_to_gray"] = to_gray[:, column].astype(np.float32)
            given[f"{side}{slot}_to_mean"] = to_mean[:, column].astype(np.float32)
    return given


def _hue_inputs(views: ViewConfig, draws: Draws) -> dict[str, np.ndarray]:
    """The weights of `dali_graph._shift_hue` for each of its steps."""
    from fastmoco.data.dali_graph import hue_steps

    sixths = 6.0 * draws.hue / hue_steps(views)
    weight = 2.0 * np.abs(sixths) - 1.0
    ahead = sixths >= 0
    neighbours = np.stack([np.ones_like(weight), np.where(ahead, -1.0, weight), np.where(ahead, weight, -1.0)], axis=1)
    return {
        "hue_used": draws.hue != 0,
        "hue_neighbours": neighbours[:, :, None].astype(np.float32),
        "hue_offset": (1.0 - np.abs(sixths)).astype(np.float32),
    }


def _blur_kernels(views: ViewConfig, sigma: np.ndarray) -> np.ndarray:
    """(N, width) float32 Gaussian kernels, torchvision's but for the tail beyond five greatest sigmas."""
    radius = min(views.blur_kernel // 2, math.ceil(5 * views.blur_sigma[1]))
    x = np.arange(-radius, radius + 1) / np.where(sigma > 0, sigma, 1.0)[:, None]
    kernel = np.exp(-0.5 * x * x)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def _rotations(size: int, degrees: np.ndarray) -> np.ndarray:
    """(N, 2, 3) float32 maps from a pixel of the rotated image to its place in the source, about the centre."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.empty((len(degrees), 2, 3), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 0, 2] = cos, -sin, (1.0 - cos + sin) * size / 2
    matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 1, 2] = sin, cos, (1.0 - cos - sin) * size / 2
    return matrix


def _explained(error: RuntimeError | None, manifest: Manifest, indices: np.ndarray) -> UserError:
    """Name those files among `indices` that stopped the pipeline or changed their size, by decoding them again."""
    sizes = {manifest.path(int(i)): tuple(manifest.sizes[i].tolist()) for i in indices}
    changed = [
        f"{path}: {verdict if isinstance(verdict, str) else 'its size has changed'}"
        for path, verdict in dali_decodable(list(sizes)).items()
        if verdict != sizes[path]
    ]
    if not changed:
        return UserError(f"DALI stopped ({_reason(error)}); the torchvision loader does without it")
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return UserError(f"{changed[0]}{more}; was it changed since the run began?")


def dali_decodable(paths: Sequence[Path]) -> dict[Path, tuple[int, int] | str]:
    """Decode each file as training will: its height and width after EXIF rotation, or why DALI cannot decode it.

    One undecodable file ends a pipeline, so a batch that fails is halved until the file stands alone.
    """
    require_dali()
    from fastmoco.data.dali_graph import decoded_sizes

    verdicts: dict[Path, tuple[int, int] | str] = {}
    batches = [list(paths[i : i + _CHECKED_AT_ONCE]) for i in range(0, len(paths), _CHECKED_AT_ONCE)]
    while batches:
        batch = batches.pop()
        try:
            verdicts.update(zip(batch, decoded_sizes(batch), strict=True))
        except RuntimeError as error:
            if len(batch) == 1:
                verdicts[batch[0]] = _reason(error)
            else:
                batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return {path: verdicts[path] for path in paths}


def _reason(error: RuntimeError | None) -> str:
    """What went wrong, without the traceback of the graph that DALI wraps around it."""
    told = str(error).rpartition("encountered:")[2].partition("C++ context")[0].partition("Current pipeline")[0]
    return " ".join(told.split()).rstrip(" :") or "unknown error"
