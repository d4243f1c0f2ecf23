"""The random draws of views, as a pure function of (seed, epoch, sample, view)."""

from __future__ import annotations

import numpy as np

from fastmoco.data.views import ViewConfig, centre_windows, resized_sizes
from fastmoco.ops.views import HUE, NEUTRAL, VIEW

# Where each draw's uniforms lie in a sample's block. The places never move and nothing is drawn on demand, so that
# a draw does not depend on which others a recipe uses.
_CROP_TRIES = 10
_CROP = slice(0, 4 * _CROP_TRIES)
_JITTER_P = 40
_JITTER = slice(41, 45)
_ORDER = slice(45, 49)
_GRAY_P, _BLUR_P, _SIGMA, _ANGLE, _FLIP_P = range(49, 54)
_BLOCK = 56

_LOG_RATIO = (np.log(3 / 4), np.log(4 / 3))


def draw(
    views: ViewConfig,
    *,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    view: int,
    sizes: np.ndarray,
    turns: np.ndarray | int = 0,
) -> np.ndarray:
    """Draw view number `view` (0: query, 1: key) of the samples `indices` (N,) in `epoch`: (N,) of dtype `VIEW`.

    `sizes` (N, 2) are the images' heights and widths; `turns` (N,), below 2^62, sets apart the times that a sample
    comes in an epoch. Draws depend on (seed, epoch, sample, turn, view) and the sample's size only, not on the batch it
    comes in. The field `image` is the sample's row, 0 to N - 1.
    """
    u = uniforms(seed, epoch, indices, 2 * np.broadcast_to(turns, indices.shape) + view)
    resized = resized_sizes(views, sizes)
    window = centre_windows(views, sizes if resized is None else resized)
    if views.crop_scale is not None:
        crop = _resized_crops(u[:, _CROP].reshape(-1, _CROP_TRIES, 4), window[:, 2:], views.crop_scale)
        crop[:, :2] += window[:, :2]
        window = crop
    jittered = u[:, _JITTER_P] < views.jitter_p
    strength = np.array(views.jitter)
    low = np.maximum(1.0 - strength, 0.0)
    low[HUE] = -strength[HUE]
    high = 1.0 + strength
    high[HUE] = strength[HUE]
    least, greatest = views.blur_sigma
    blurred = (u[:, _BLUR_P] < views.blur_p) & views.blurs
    drawn = np.zeros(len(indices), dtype=VIEW)
    drawn["image"] = np.arange(len(indices))
    if resized is not None:
        drawn["resized"] = resized
    drawn["window"] = window
    drawn["order"] = np.argsort(u[:, _ORDER], axis=1, kind="stable")
    drawn["factor"] = np.where(jittered[:, None], low + (high - low) * u[:, _JITTER], NEUTRAL)
    drawn["sigma"] = np.where(blurred, least + (greatest - least) * u[:, _SIGMA], 0.0)
    drawn["angle"] = views.rotation * (2.0 * u[:, _ANGLE] - 1.0)
    drawn["gray"] = u[:, _GRAY_P] < views.gray_p
    drawn["flip"] = u[:, _FLIP_P] < views.flip_p
    return drawn


def uniforms(
    seed: int, epoch: int, indices: np.ndarray, views: np.ndarray, *, stream: int = 0, count: int = _BLOCK
) -> np.ndarray:
    """(N, count) float64 uniforms in [0, 1): row i is the Philox stream of (seed, epoch, indices[i], views[i]).

    `stream` sets apart what draws of different kinds are made from; that of views is 0.
    """
    bits = np.random.Philox(key=[seed, stream], counter=[0, 0, 0, epoch])
    state = bits.state
    counter = state["state"]["counter"]
    raw = np.empty((len(indices), count), dtype=np.uint64)
    for row, (sample, view) in enumerate(zip(indices, views, strict=True)):
        # Moving one generator's counter costs a fifth of making a generator for each sample.
        counter[1], counter[2] = view, sample
        bits.state = state
        raw[row] = bits.random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _resized_crops(u: np.ndarray, sizes: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Windows (N, 4) of torchvision's random resized crop, from uniforms (N, tries, 4) and sizes (N, 2).

    The first try that fits counts; where none does, the centre is taken, cut to the nearest allowed ratio.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * u[..., 1])
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    chosen = np.arange(len(u)), fits.argmax(axis=1)
    h, w = h[chosen], w[chosen]
    top = np.floor(u[..., 2][chosen] * (sizes[:, 0] - h + 1)).astype(np.int64)
    left = np.floor(u[..., 3][chosen] * (sizes[:, 1] - w + 1)).astype(np.int64)
    windows = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], windows, _centre_crops(sizes))


def _centre_crops(sizes: np.ndarray) -> np.ndarray:
    """torchvision's fallback: the largest central window (N, 4) whose ratio is within 3/4 to 4/3."""
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = width / height
    h = np.where(ratio < 3 / 4, np.rint(width / (3 / 4)), height).astype(np.int64)
    w = np.where(ratio > 4 / 3, np.rint(height * (4 / 3)), width).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
