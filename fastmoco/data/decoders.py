"""Decoding a batch of images that are named by their index, with DALI or on the host; each gives what it cannot."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.dali import DaliDecoder
from fastmoco.data.manifest import Manifest
from fastmoco.data.store import BadFile
from fastmoco.data.undecodable import Undecodable

Encoded = bytes | np.ndarray
Decoded = np.ndarray | Tensor


class Decoder(Protocol):
    """Decodes batches in the background, in the order in which they are submitted."""

    def submit(self, indices: Sequence[int], encoded: Sequence[Encoded]) -> None:
        """Begin to decode a batch: images `indices` of the manifest, as `Manifest.read` gave them."""

    def result(self) -> list[Decoded | BadFile]:
        """The first batch that was submitted and not given yet: images (H, W, 3) uint8 or uint16."""

    def close(self) -> None:
        """Stop what still runs."""


class HostDecoder:
    """Decodes with Pillow and pydicom in `threads` threads."""

    def __init__(self, manifest: Manifest, *, threads: int) -> None:
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode")
        self._waiting: deque[list[Future[np.ndarray | BadFile]]] = deque()

    def submit(self, indices: Sequence[int], encoded: Sequence[Encoded]) -> None:
        """Begin to decode a batch, which may be empty."""
        self._waiting.append([self._pool.submit(self.decode, *item) for item in zip(indices, encoded, strict=True)])

    def result(self) -> list[Decoded | BadFile]:
        """The images of the first batch that waits."""
        return [future.result() for future in self._waiting.popleft()]

    def decode(self, index: int, encoded: Encoded) -> np.ndarray | BadFile:
        """One image, in the calling thread."""
        try:
            return self._manifest.decode_bytes(index, encoded)
        except BadFile as bad:
            return bad

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class MixedDecoder:
    """Decodes with DALI what the manifest says that DALI decodes right, and the rest on the host.

    Where DALI turns out not to decode a file, the host has a try before it counts as bad.
    """

    def __init__(self, manifest: Manifest, *, batch_size: int, threads: int, device: torch.device) -> None:
        self._manifest = manifest
        sizes = manifest.sizes[manifest.dali].astype(np.int64)
        largest = int(sizes.prod(axis=1).max(initial=0))
        self._dali = DaliDecoder(batch_size=batch_size, threads=threads, device=device, largest=largest)
        self._host = HostDecoder(manifest, threads=threads)
        self._waiting: deque[tuple[Sequence[int], Sequence[Encoded], list[int]]] = deque()

    def submit(self, indices: Sequence[int], encoded: Sequence[Encoded]) -> None:
        """Begin to decode a batch."""
        dali = [i for i, (index, data) in enumerate(zip(indices, encoded, strict=True)) if self._for_dali(index, data)]
        host = sorted(set(range(len(indices))) - set(dali))
        if dali:
            self._dali.submit([bytes(encoded[i]) for i in dali])
        self._host.submit([indices[i] for i in host], [encoded[i] for i in host])
        self._waiting.append((indices, encoded, dali))

    def result(self) -> list[Decoded | BadFile]:
        """The images of the first batch that waits, on the device where it was decoded."""
        indices, encoded, dali = self._waiting.popleft()
        found: dict[int, Decoded | BadFile] = {}
        for i, image in zip(dali, self._dali.result() if dali else [], strict=True):
            found[i] = self._host.decode(indices[i], encoded[i]) if isinstance(image, Undecodable) else image
        host = iter(self._host.result())
        return [found[i] if i in found else next(host) for i in range(len(indices))]

    def _for_dali(self, index: int, data: Encoded) -> bool:
        return bool(self._manifest.dali[index]) and isinstance(data, bytes)

    def close(self) -> None:
        """Stop the host's threads; DALI's end with the pipeline."""
        self._host.close()
