"""From the order of the images to their views: read, decode, replace what is bad, cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.buffers import Buffers
from fastmoco.data.decoders import Decoded, Decoder, Encoded
from fastmoco.data.draws import draw
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order, Slots
from fastmoco.data.quarantine import Bad, Quarantine, check_there
from fastmoco.data.store import BadFile
from fastmoco.data.views import ViewConfig
from fastmoco.ops.views import make_views

# Batches being read while one is decoded and one is cut: enough to hide a slow file system's latency.
_READ_AHEAD = 2
# A thread that waits for a file costs next to nothing, so there are more of them than of those that work.
_READERS_PER_WORKER = 4
# One being made, those that the loader holds ready, one being trained on, and one that is about to be let go.
_BUFFERS = 6

Data = TypeVar("Data")


@dataclass(kw_only=True)
class ViewStream:
    """Makes micro-batches of `order` from the images of `manifest`, one after the other.

    make_decoder: called in the thread that makes the batches, so that the decoder's threads have its priority.
    implementation: of the views; None takes the fastest that can run. device: where the views are made.
    """

    manifest: Manifest
    views: ViewConfig
    order: Order
    make_decoder: Callable[[], Decoder]
    quarantine: Quarantine
    threads: int
    device: torch.device
    implementation: str | None = None
    buffers: Buffers = field(default_factory=lambda: Buffers(_BUFFERS))

    def batches(self, start: int, stop: int) -> Generator[tuple[Tensor, Tensor, np.ndarray], None, None]:
        """Yield micro-batches `start` to `stop` - 1: the two views, (N, size, size, 3) float16 each, and the indices
        (N,) int64 of the images that the first shows. Raises TooManyBad, and ImagesGone.
        """
        reading: deque[tuple[int, Slots, dict[int, Future[Encoded | BadFile]]]] = deque()
        decoding: deque[tuple[int, Slots]] = deque()
        encoded: dict[int, Encoded]
        images: dict[int, Decoded]
        readers = ThreadPoolExecutor(_READERS_PER_WORKER * max(self.threads, 1), thread_name_prefix="read")
        ahead = iter(range(start, stop))
        decoder = self.make_decoder()
        try:
            for _ in range(start, stop):
                # One batch more than the decoder holds has been read by the time that it is needed.
                while len(decoding) < 2:
                    while len(reading) <= _READ_AHEAD and (t := next(ahead, None)) is not None:
                        slots = self._without(self.order.batch(t), self.quarantine)
                        reading.append((t, slots, {i: readers.submit(self._read, i) for i in slots.images}))
                    if not reading:
                        break
                    t, slots, futures = reading.popleft()
                    read = {index: future.result() for index, future in futures.items()}
                    slots, encoded = self._complete(t, slots, read, self._read)
                    decoder.submit(list(encoded), list(encoded.values()))
                    decoding.append((t, slots))
                t, slots = decoding.popleft()
                decoded = {i: self._problem(i, image) for i, image in zip(slots.images, decoder.result(), strict=True)}
                slots, images = self._complete(t, slots, decoded, self._one)
                yield (*self._cut(slots, images), slots.indices)
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            decoder.close()

    def _read(self, index: int) -> Encoded | BadFile:
        try:
            return self.manifest.read(index)
        except BadFile as bad:
            return bad

    def _without(self, slots: Slots, met: Container[int]) -> Slots:
        """`slots` with others, not known to be bad, in the place of the images among `met`."""
        if not any(index in met for index in slots.images):
            return slots
        self.quarantine.check(of=len(self.manifest))
        return self.order.without(slots, met, self.quarantine)

    def _complete(
        self, t: int, slots: Slots, found: Mapping[int, Data | BadFile], get: Callable[[int], Data | BadFile]
    ) -> tuple[Slots, dict[int, Data]]:
        """Put others in the place of what is bad in `found`, and `get` them, until all of the batch is there.

        Returns the slots and what was found of each of their images.
        """
        while bad := {index: data for index, data in found.items() if isinstance(data, BadFile)}:
            for index, problem in bad.items():
                self._set_aside(t, index, problem)
            slots = self._without(slots, bad)
            found = {index: found[index] if index in found else get(index) for index in slots.images}
        return slots, {index: data for index, data in found.items() if not isinstance(data, BadFile)}

    def _problem(self, index: int, image: Decoded | BadFile) -> Decoded | BadFile:
        """`image`, or that it is not of the size that the manifest has."""
        if isinstance(image, BadFile) or tuple(image.shape[:2]) == tuple(self.manifest.sizes[index].tolist()):
            return image
        height, width = self.manifest.sizes[index].tolist()
        is_now = f"{image.shape[0]} x {image.shape[1]} pixels"
        return BadFile(self.manifest.files[index], f"changed since it was checked: {is_now}, was {height} x {width}")

    def _one(self, index: int) -> Decoded | BadFile:
        """A substitute, read and decoded out of turn, by the host: it is one image."""
        data = self._read(index)
        if isinstance(data, BadFile):
            return data
        try:
            return self.manifest.decode_bytes(index, data)
        except BadFile as bad:
            return bad

    def _set_aside(self, t: int, index: int, bad: BadFile) -> None:
        check_there(self.manifest)
        self.quarantine.add(Bad(index, self.manifest.files[index], bad.reason, t))

    def _cut(self, slots: Slots, images: dict[int, Decoded]) -> tuple[Tensor, Tensor]:
        row = {index: row for row, index in enumerate(images)}
        drawn = []
        for view, shown in enumerate((slots.indices, slots.keys)):
            # A partner's view is drawn as its query's: the same partner of two queries has two views.
            records = draw(
                self.views, seed=self.order.seed, epoch=slots.epoch, indices=slots.indices, view=view,
                sizes=self.manifest.sizes[shown], turns=slots.turns,
            )  # fmt: skip
            records["image"] = [row[index] for index in shown.tolist()]
            drawn.append(records)
        pictures = list(images.values())
        if self.device.type == "cuda":
            # What the host has decoded joins what the GPU has.
            pictures = [torch.as_tensor(picture).to(self.device, non_blocking=True) for picture in pictures]
        size = self.views.size
        on_cpu = self.device.type == "cpu"
        made = make_views(
            pictures, np.concatenate(drawn), size=size, blur_kernel=self.views.blur_kernel,
            threads=max(self.threads, 1), implementation=self.implementation,
            out=self.buffers.take((2 * len(slots.indices), size, size, 3)) if on_cpu else None,
        )  # fmt: skip
        if not on_cpu:
            # The images are DALI's memory, and whether it asks this stream before it uses that again is not documented.
            torch.cuda.current_stream(self.device).synchronize()
        q, k = made.chunk(2)
        return q, k
