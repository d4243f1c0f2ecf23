"""DALI's native operators for what a view does, on the CPU: what stands beside our own in the table of errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data.dali import dali_installed
from fastmoco.ops.views import BRIGHTNESS, CONTRAST, HUE, SATURATION

Graph = Callable[[Any, np.ndarray, int], Any]


def native(images: Sequence[np.ndarray], view: np.ndarray, graph: Graph, size: int) -> np.ndarray | None:
    """(N, H, W, C) float32 in [0, 1]: what `graph` makes of `images` (N of (H, W, 3) uint8), asked for the record
    `view` of a view of `size` pixels; None where DALI is not installed."""
    if not dali_installed():
        return None
    from nvidia.dali import fn, types

    def source(pixels: Any) -> Any:
        return fn.cast(graph(pixels, view, size), dtype=types.FLOAT)

    made = _run(source, [np.ascontiguousarray(image) for image in images], layout="HWC")
    return np.stack(made).clip(0, 255) / 255


def decoded(files: Sequence[Path]) -> list[np.ndarray] | None:
    """The files as DALI decodes them, (H, W, 3) uint8 each; None where it is not installed."""
    if not dali_installed():
        return None
    from nvidia.dali import fn, types

    encoded = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files]
    return _run(lambda data: fn.decoders.image(data, output_type=types.RGB), encoded, layout=None)


def _run(graph: Callable[[Any], Any], batch: list[np.ndarray], *, layout: str | None) -> list[np.ndarray]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(batch), num_threads=1, device_id=None)
    def pipeline() -> Any:
        return graph(fn.external_source(source=lambda: batch, batch=True, layout=layout))

    built = pipeline()
    built.build()
    (made,) = built.run()
    return [np.array(made.at(i)) for i in range(len(batch))]


def resized_window(pixels: Any, view: np.ndarray, size: int) -> Any:
    """As DALI's random crops resize: what surrounds the window is at hand."""
    from nvidia.dali import fn, types

    top, left, height, width = (float(value) for value in view["window"])
    return fn.resize(
        pixels,
        roi_start=[top, left],
        roi_end=[top + height, left + width],
        size=[size, size],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )


def brightness(pixels: Any, view: np.ndarray, _: int) -> Any:
    from nvidia.dali import fn, types

    return fn.brightness(pixels, brightness=float(view["factor"][BRIGHTNESS]), dtype=types.FLOAT)


def contrast(pixels: Any, view: np.ndarray, _: int) -> Any:
    """About middle gray: the image's own mean is not known to it."""
    from nvidia.dali import fn, types

    return fn.contrast(pixels, contrast=float(view["factor"][CONTRAST]), dtype=types.FLOAT)


def saturation(pixels: Any, view: np.ndarray, _: int) -> Any:
    from nvidia.dali import fn, types

    return fn.saturation(pixels, saturation=float(view["factor"][SATURATION]), dtype=types.FLOAT)


def hue(pixels: Any, view: np.ndarray, _: int) -> Any:
    from nvidia.dali import fn, types

    return fn.hue(pixels, hue=360 * float(view["factor"][HUE]), dtype=types.FLOAT)


def colour_twist(pixels: Any, view: np.ndarray, _: int) -> Any:
    """All four in one linear map, whatever their order."""
    from nvidia.dali import fn, types

    factors = [float(factor) for factor in view["factor"]]
    return fn.color_twist(
        pixels,
        brightness=factors[BRIGHTNESS],
        contrast=factors[CONTRAST],
        saturation=factors[SATURATION],
        hue=360 * factors[HUE],
        dtype=types.FLOAT,
    )


def gray(pixels: Any, _: np.ndarray, __: int) -> Any:
    from nvidia.dali import fn, types

    one = fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(one, one, one, axis=2)


def gaussian_blur(pixels: Any, view: np.ndarray, size: int) -> Any:
    from nvidia.dali import fn, types

    return fn.gaussian_blur(
        pixels, sigma=float(view["sigma"]), window_size=2 * int(0.1 * size / 2) + 1, dtype=types.FLOAT
    )


def rotate(pixels: Any, view: np.ndarray, _: int) -> Any:
    from nvidia.dali import fn, types

    return fn.rotate(
        pixels,
        angle=float(view["angle"]),
        keep_size=True,
        fill_value=0,
        interp_type=types.INTERP_LINEAR,
        dtype=types.FLOAT,
    )


def flip(pixels: Any, _: np.ndarray, __: int) -> Any:
    from nvidia.dali import fn

    return fn.flip(pixels, horizontal=1)
