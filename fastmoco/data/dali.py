"""Decoding with NVIDIA DALI: one pipeline definition for the CPU and the GPU. Nothing here imports DALI before it runs.

DALI decodes, and no more: what it would get wrong against torchvision (resizing at borders, hue, contrast) is done by
`fastmoco.ops.views`, which reads its output where it lies.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.undecodable import Undecodable
from fastmoco.errors import UserError

_INPUT = "encoded"


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Raise UserError, saying what to install, where NVIDIA DALI is missing."""
    if not dali_installed():
        raise UserError(
            "loader dali: NVIDIA DALI is not installed; pip install 'fastmoco[dali-cuda13]' (or "
            "'fastmoco[dali-cuda12]' for CUDA 12), or choose the pillow loader"
        )


def decode_pipeline(*, batch_size: int, threads: int, device: torch.device, largest: int = 0) -> Any:
    """A DALI pipeline from the encoded bytes fed to "encoded" to (H, W, 3) uint8 RGB, upright by EXIF.

    `device` is the CPU, or the GPU that decodes ("mixed": the entropy decoding of some formats stays on the CPU). The
    placement differs in nothing else. `largest` is the number of pixels of the largest image, from the manifest, by
    which the GPU's buffers are sized (0: they grow as images come).
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        # An output lives as long as a tensor refers to it, and a batch is scheduled when it is fed, so that one can be
        # decoded while views are cut from another. The depth of the queue is `DaliDecoder`'s.
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        return fn.decoders.image(
            fn.external_source(name=_INPUT, no_copy=True),
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            # The GPU's decoder would otherwise repeat chroma samples, where libjpeg interpolates them.
            jpeg_fancy_upsampling=True,
            # A progressive JPEG needs a copy of its coefficients besides.
            device_memory_padding=3 * largest,
            host_memory_padding=3 * largest,
        )

    return graph()


class DaliDecoder:
    """Decodes batches in the order in which they are submitted, each in the background once it is.

    One image that it cannot decode ends a DALI pipeline: its batch is then decoded in halves until the image stands
    alone, and the pipeline is made anew.
    """

    def __init__(self, *, batch_size: int, threads: int, device: torch.device, largest: int = 0) -> None:
        require_dali()
        self._settings: dict[str, Any] = {"threads": max(threads, 1), "device": device, "largest": largest}
        self._batch_size = batch_size
        self._waiting: deque[list[np.ndarray]] = deque()
        self._pipeline = self._start(batch_size)

    def submit(self, encoded: Sequence[bytes]) -> None:
        """Begin to decode a batch of at least one file."""
        # An empty array cannot be fed; a byte that begins no image is refused like it.
        arrays = [np.frombuffer(data or b"\0", dtype=np.uint8) for data in encoded]
        self._waiting.append(arrays)
        if len(self._waiting) == 1:
            self._feed(self._pipeline, arrays)

    def result(self) -> list[Tensor | Undecodable]:
        """The images of the batch submitted first of those not yet given: (H, W, 3) uint8, or why there is none."""
        arrays = self._waiting.popleft()
        images: list[Tensor | Undecodable]
        try:
            images = [*self._take(self._pipeline)]
        except RuntimeError:
            images = self._in_halves(arrays)
            self._pipeline = self._start(self._batch_size)
        if self._waiting:
            self._feed(self._pipeline, self._waiting[0])
        return images

    def _start(self, batch_size: int) -> Any:
        pipeline = decode_pipeline(batch_size=batch_size, **self._settings)
        pipeline.build()
        return pipeline

    def _feed(self, pipeline: Any, arrays: list[np.ndarray]) -> None:
        pipeline.feed_input(_INPUT, arrays)
        pipeline.schedule_run()

    def _take(self, pipeline: Any) -> list[Tensor]:
        (images,) = pipeline.share_outputs()
        tensors = [torch.from_dlpack(images[i]) for i in range(len(images))]
        pipeline.release_outputs()
        return tensors

    def _in_halves(self, arrays: list[np.ndarray]) -> list[Tensor | Undecodable]:
        try:
            pipeline = self._start(len(arrays))
            self._feed(pipeline, arrays)
            return [*self._take(pipeline)]
        except RuntimeError as error:
            if len(arrays) == 1:
                return [Undecodable(reason(error))]
        half = len(arrays) // 2
        return self._in_halves(arrays[:half]) + self._in_halves(arrays[half:])


def reason(error: RuntimeError) -> str:
    """What DALI says went wrong, without the traceback of the graph that it wraps around it."""
    told = str(error).rpartition("encountered:")[2].partition("C++ context")[0].partition("Current pipeline")[0]
    return " ".join(told.split()).rstrip(" :") or "unknown error"
