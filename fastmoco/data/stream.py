"""From the order of the images to their views: read, decode, replace what is bad, cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

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
        (N,) int64 of the images that they show. Raises TooManyBad, and ImagesGone.
        """
        reading: deque[tuple[int, Slots, list[Future[Encoded | BadFile]]]] = deque()
        decoding: deque[tuple[int, Slots]] = deque()
        readers = ThreadPoolExecutor(_READERS_PER_WORKER * max(self.threads, 1), thread_name_prefix="read")
        ahead = iter(range(start, stop))
        decoder = self.make_decoder()
        try:
            for _ in range(start, stop):
                # One batch more than the decoder holds has been read by the time that it is needed.
                while len(decoding) < 2:
                    while len(reading) <= _READ_AHEAD and (t := next(ahead, None)) is not None:
                        slots = self._without_known_bad(self.order.batch(t))
                        reading.append((t, slots, [readers.submit(self._read, int(i)) for i in slots.indices]))
                    if not reading:
                        break
                    t, slots, futures = reading.popleft()
                    slots, encoded = self._settle(t, slots, [future.result() for future in futures])
                    decoder.submit(slots.indices.tolist(), encoded)
                    decoding.append((t, slots))
                t, slots = decoding.popleft()
                slots, images = self._checked(t, slots, decoder.result())
                yield (*self._cut(slots, images), slots.indices)
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            decoder.close()

    def _read(self, index: int) -> Encoded | BadFile:
        try:
            return self.manifest.read(index)
        except BadFile as bad:
            return bad

    def _without_known_bad(self, slots: Slots) -> Slots:
        for row, index in enumerate(slots.indices):
            if int(index) in self.quarantine:
                slots = self._substituted(slots, row)
        return slots

    def _substituted(self, slots: Slots, row: int) -> Slots:
        self.quarantine.check(of=len(self.manifest))
        place = int(slots.places[row])
        indices, turns = slots.indices.copy(), slots.turns.copy()
        indices[row], turns[row] = self.order.substitute(slots.epoch, place, self.quarantine), place + 1
        return slots._replace(indices=indices, turns=turns)

    def _settle(self, t: int, slots: Slots, found: list[Encoded | BadFile]) -> tuple[Slots, list[Encoded]]:
        """Put others in the place of what could not be read, until all of the batch is read."""
        encoded: list[Encoded] = []
        for row, data in enumerate(found):
            while isinstance(data, BadFile):
                self._set_aside(t, int(slots.indices[row]), data)
                slots = self._substituted(slots, row)
                data = self._read(int(slots.indices[row]))
            encoded.append(data)
        return slots, encoded

    def _checked(self, t: int, slots: Slots, found: list[Decoded | BadFile]) -> tuple[Slots, list[Decoded]]:
        """Put others in the place of what could not be decoded, or not to the size that the manifest has."""
        images: list[Decoded] = []
        for row, image in enumerate(found):
            index = int(slots.indices[row])
            while isinstance(problem := self._problem(index, image), BadFile):
                self._set_aside(t, index, problem)
                slots = self._substituted(slots, row)
                index = int(slots.indices[row])
                image = self._one(index)
            images.append(problem)
        return slots, images

    def _problem(self, index: int, image: Decoded | BadFile) -> Decoded | BadFile:
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

    def _cut(self, slots: Slots, images: list[Decoded]) -> tuple[Tensor, Tensor]:
        sizes = self.manifest.sizes[slots.indices]
        drawn = [
            draw(
                self.views, seed=self.order.seed, epoch=slots.epoch, indices=slots.indices, view=view, sizes=sizes,
                turns=slots.turns,
            )
            for view in (0, 1)
        ]  # fmt: skip
        if self.device.type == "cuda":
            # What the host has decoded joins what the GPU has.
            images = [torch.as_tensor(image).to(self.device, non_blocking=True) for image in images]
        size = self.views.size
        on_cpu = self.device.type == "cpu"
        made = make_views(
            images, np.concatenate(drawn), size=size, blur_kernel=self.views.blur_kernel,
            threads=max(self.threads, 1), implementation=self.implementation,
            out=self.buffers.take((2 * len(images), size, size, 3)) if on_cpu else None,
        )  # fmt: skip
        if not on_cpu:
            # The images are DALI's memory, and whether it asks this stream before it uses that again is not documented.
            torch.cuda.current_stream(self.device).synchronize()
        q, k = made.chunk(2)
        return q, k
