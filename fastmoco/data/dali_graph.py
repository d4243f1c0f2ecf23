"""The DALI operator graph that makes pairs of views. Importing it needs DALI.

Colours are worked on as float32 pixels (3, S * S) in 0..255, one row a channel: DALI's arithmetic is several times
faster on whole rows than on interleaved channels, and a filter along the rows' axis mixes them in one pass. An `if`
on a DALI value picks the samples of the batch that take the branch.
"""

from __future__ import annotations

import math as pymath
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from fastmoco.data.views import ViewConfig

_GRAY = np.array([[0.2989], [0.587], [0.114]], dtype=np.float32)
_WHITE = np.float32(255)
_BLACK = np.float32(0)


def view_pipeline(
    views: ViewConfig,
    source: Callable[[int], list[Any]],
    names: Sequence[str],
    *,
    batch_size: int,
    threads: int,
    device: str = "cpu",
) -> Pipeline:
    """A pipeline whose outputs are the two views, each (N, size, size, 3) float16 in [0, 1], and the shapes (N, 3)
    of the decoded images.

    `source(step)` returns the inputs of a step in the order of `names` (see `dali.graph_inputs`). The placement
    on a GPU differs only in `device`.
    """
    decoder = {"cpu": "cpu", "gpu": "mixed"}[device]

    @pipeline_def(batch_size=batch_size, num_threads=threads, enable_conditionals=True)
    def graph() -> tuple[DataNode, DataNode, DataNode]:
        nodes = fn.external_source(source=source, num_outputs=len(names), batch=True)
        given = {name: nodes[i] for i, name in enumerate(names)}
        image = fn.decoders.image(fn.io.file.read(given["path"]), device=decoder, output_type=types.RGB)
        shape = image.shape()
        if views.resize is not None:
            image = fn.resize(
                image,
                size=(views.size, views.size),
                roi_start=given["region_start"],
                roi_end=given["region_end"],
                antialias=True,
                dtype=types.FLOAT,
            )
        return _view(image, views, given, "q"), _view(image, views, given, "k"), shape

    return graph(device_id=None if device == "cpu" else 0)


def _view(image: DataNode, views: ViewConfig, given: dict[str, DataNode], which: str) -> DataNode:
    own = {name.removeprefix(which + "_"): node for name, node in given.items() if name.startswith(which + "_")}
    if views.crop_scale is not None:
        # Cut first, so that the resize sees nothing outside of the window, as in torchvision.
        image = fn.slice(image, start=own["start"], shape=own["shape"], axes=(0, 1))
        image = fn.resize(image, size=(views.size, views.size), antialias=True, dtype=types.FLOAT)
    pixels = fn.reshape(fn.transpose(image, perm=(2, 0, 1)), shape=(3, views.size**2), layout="HW")
    if views.jitters:
        pixels = _jitter(pixels, views, own)
    if views.gray_p > 0 and own["gray"]:
        gray = _gray(pixels)
        pixels = fn.cat(gray, gray, gray, axis=0)
    image = fn.reshape(pixels, shape=(3, views.size, views.size), layout="CHW")
    if views.blurs and own["blurred"]:
        image = fn.filter(image, own["kernel_y"], border="reflect_101")
        image = fn.filter(image, own["kernel_x"], border="reflect_101")
    if views.rotation > 0:
        image = fn.transpose(image, perm=(1, 2, 0))
        image = fn.warp_affine(image, matrix=own["rotation"], fill_value=0.0, interp_type=types.INTERP_LINEAR)
    return fn.crop_mirror_normalize(
        image, mirror=own["flip"] if views.flip_p > 0 else 0, std=255.0, dtype=types.FLOAT16, output_layout="HWC"
    )


def _jitter(pixels: DataNode, views: ViewConfig, own: dict[str, DataNode]) -> DataNode:
    """The four colour operations in the drawn order: up to three linear ones, the hue, and the rest of the linear."""
    for slot in range(3):
        if own[f"before{slot}_used"]:
            pixels = _linear(pixels, own, f"before{slot}")
    if views.jitter[3] > 0 and own["hue_used"]:
        for _ in range(hue_steps(views)):
            pixels = _shift_hue(pixels, own["hue_neighbours"], own["hue_offset"])
    for slot in range(3):
        if own[f"after{slot}_used"]:
            pixels = _linear(pixels, own, f"after{slot}")
    return pixels


def _linear(pixels: DataNode, own: dict[str, DataNode], slot: str) -> DataNode:
    """Brightness, contrast or saturation: factor * x + to_gray * gray(x) + to_mean * mean(gray(x)), clipped."""
    gray = _gray(pixels)
    mean = fn.reductions.mean(gray)
    blend = own[slot + "_to_gray"] * gray + own[slot + "_to_mean"] * mean
    return math.min(math.max(own[slot + "_factor"] * pixels + blend, _BLACK), _WHITE)


def _gray(pixels: DataNode) -> DataNode:
    """(1, S * S): the weighted sum over the channels."""
    return fn.filter(pixels, _GRAY, mode="valid")


def _shift_hue(pixels: DataNode, neighbours: DataNode, offset: DataNode) -> DataNode:
    """Shift the hue by s sixths of a turn, |s| <= 1, without going through HSV.

    The shift keeps each pixel's least and greatest channel, m and M. Between them red is a trapezoid over the hue,
    so for s >= 0 it becomes r - g + (2s - 1) b + (1 - s) (m + M) clipped to [m, M]; the same for green and blue
    with the channels rotated, and for s < 0 with the two neighbours swapped. `neighbours` holds the channels'
    weights (1, -1, 2s - 1) as a filter along the channels that wraps round, and `offset` is 1 - s.
    """
    r, g, b = pixels[0], pixels[1], pixels[2]
    least = math.min(math.min(r, g), b)
    greatest = math.max(math.max(r, g), b)
    shifted = fn.filter(pixels, neighbours, anchor=(0, 0), border="wrap") + offset * (least + greatest)
    return math.min(math.max(shifted, least), greatest)


def hue_steps(views: ViewConfig) -> int:
    """Into how many equal shifts of at most a sixth of a turn the hue shift is split."""
    return max(1, pymath.ceil(6 * views.jitter[3] - 1e-9))


def decoded_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Heights and widths of the decoded files. Raises RuntimeError if one of them cannot be decoded."""

    @pipeline_def(batch_size=len(paths), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def graph() -> DataNode:
        encoded = fn.io.file.read(fn.external_source(source=[path_bytes(paths)], batch=True, cycle=False))
        return fn.decoders.image(encoded, output_type=types.RGB)

    pipeline = graph()
    (images,) = pipeline.run()
    return [tuple(shape[:2]) for shape in images.shape()]


def path_bytes(paths: Sequence[Path]) -> list[np.ndarray]:
    """The paths as the uint8 arrays that DALI's file reader takes."""
    return [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in paths]
