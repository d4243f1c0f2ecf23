"""Batches of view pairs for training: the same images and draws whatever decodes them and however many share them."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.dali import dali_installed, require_dali
from fastmoco.data.decoders import Decoder, HostDecoder, MixedDecoder
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.stream import ViewStream
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError

LoaderKind = Literal["auto", "dali", "pillow", "torchvision"]

# Batches that are ready before they are asked for.
_PREFETCH = 2
# Of the threads that make batches, against 0 of those that train.
_NICE = 10


@dataclass(frozen=True, slots=True)
class Batch:
    """Views `q` of the images `indices` (N,) int64, and `k` of the same or, where the order pairs them, their partners.

    Each is (N, 3, size, size) float16 in [0, 1], channels_last: its memory is dense NHWC.
    """

    q: Tensor
    k: Tensor
    indices: np.ndarray


Made = tuple[Tensor, Tensor, np.ndarray]


class _Maker:
    """A thread that makes batches on `stream` and puts them, or what stopped it, into the queue `ready`."""

    def __init__(self, batches: Generator[Made, None, None], stream: torch.cuda.Stream | None) -> None:
        self.ready: queue.Queue[tuple[Made, torch.cuda.Event | None] | BaseException] = queue.Queue(_PREFETCH)
        self._batches, self._stream = batches, stream
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._make, name="views", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the batch that it is making."""
        self._closing.set()
        self._thread.join()

    def _make(self) -> None:
        _give_way()
        try:
            with torch.cuda.stream(self._stream), contextlib.closing(self._batches):
                for made in self._batches:
                    event = self._stream.record_event() if self._stream else None
                    if not self._put((made, event)):
                        return
            self._put(RuntimeError("more batches were asked for than there are"))
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[Made, torch.cuda.Event | None] | BaseException) -> bool:
        """Hand `item` over; False where nobody waits for it any more."""
        while not self._closing.is_set():
            try:
                self.ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False


def _give_way() -> None:
    """Let training go first where this thread, and those that it starts, want a core that training wants too.

    The threads of a convolution wait for each other: one that lost its core for a time slice holds up all of them.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class Loader(Iterator[Batch]):
    """An iterator over micro-batches, which a thread makes ahead of time.

    It gives its threads back on `close()` or at the end of a `with` block. On a GPU the batches are made on a stream of
    their own, for which the stream that asks for a batch waits.
    """

    def __init__(self, batches: Generator[Made, None, None], length: int, device: torch.device) -> None:
        self._left = length
        self._maker = _Maker(batches, torch.cuda.Stream(device) if device.type == "cuda" else None)
        # Also when the loader is dropped, and before the interpreter ends: the threads know nothing of the loader.
        self._finalizer = weakref.finalize(self, self._maker.stop)

    def __len__(self) -> int:
        """Micro-batches still to come."""
        return self._left

    def __next__(self) -> Batch:
        if not self._left:
            self.close()
            raise StopIteration
        got = self._maker.ready.get()
        if isinstance(got, BaseException):
            self.close()
            raise got
        (q, k, indices), event = got
        if event is not None:
            current = torch.cuda.current_stream(q.device)
            current.wait_event(event)
            # Not to be given to another batch before what was begun with it is done.
            q.record_stream(current)
            k.record_stream(current)
        self._left -= 1
        return Batch(q.permute(0, 3, 1, 2), k.permute(0, 3, 1, 2), indices)

    def close(self) -> None:
        """Stop the threads and free their buffers. May be called more than once."""
        self._left = 0
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def default_workers(device: torch.device | str) -> int:
    """The threads that keep up with training on `device`, where nobody has said how many.

    A CPU that trains has the loader's work to do as well, a tenth to a fifth of it all, and each thread more that asks
    for a core in the middle of an operation holds up the others: on two cores 3 to 10 % of a run (measured). Of torch's
    threads there are as many as this process has cores for itself.
    """
    return 2 if torch.device(device).type == "cuda" else max(1, torch.get_num_threads() // 4)


def make_loader(
    kind: LoaderKind,
    manifest: Manifest,
    views: ViewConfig,
    order: Order,
    *,
    start: int,
    stop: int,
    workers: int | None = None,
    device: torch.device | str = "cpu",
    quarantine: Quarantine | None = None,
) -> Loader:
    """Load micro-batches `start` to `stop` - 1 of `order`.

    `kind` "dali" decodes with NVIDIA DALI, on `device` where that is a GPU, "pillow" on the host, and "auto" with DALI
    where it is installed; "torchvision" decodes with Pillow and makes the views with torchvision's transforms, the
    definition, slowly. `workers` threads decode and as many make the views, `default_workers` of them where it is None.
    What a batch holds depends on the seed of `order` and on the batch's number, not on `start`, `stop` or `workers`.

    An image that cannot be read any more, or has changed since it was checked, joins `quarantine`, and another comes in
    its place (see `Order.without`). Without a quarantine, one such image is too many.

    Raises UserError where `order` was made for another number of images, where DALI is asked for and not
    installed, and, while iterating, TooManyBad with the list of what could not be read, and ImagesGone where that is
    nearly everything.
    """
    if order.samples != len(manifest):
        raise UserError(f"the order is of {order.samples} images, but the manifest lists {len(manifest)}")
    workers = default_workers(device) if workers is None else workers
    if not 0 <= start <= stop or workers < 0:
        raise UserError(f"needs 0 <= start <= stop and workers >= 0, not {start}, {stop}, {workers}")
    if kind not in get_args(LoaderKind):
        raise UserError(f"loader: one of {', '.join(get_args(LoaderKind))}, not {kind!r}")
    if kind == "dali":
        require_dali()
    where = torch.device(device)
    decoder: Callable[[], Decoder]
    if kind == "dali" or (kind == "auto" and dali_installed()):
        most = order.local_size * (1 if order.pairs is None else 2)
        decoder = partial(MixedDecoder, manifest, batch_size=most, threads=workers, device=where)
    else:
        decoder = partial(HostDecoder, manifest, threads=workers)
    stream = ViewStream(
        manifest=manifest,
        views=views,
        order=order,
        make_decoder=decoder,
        quarantine=Quarantine(0) if quarantine is None else quarantine,
        threads=workers,
        device=where,
        implementation="reference" if kind == "torchvision" else None,
    )
    return Loader(stream.batches(start, stop), stop - start, where)
