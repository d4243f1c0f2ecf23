"""Metrics: gathered on the device, read at intervals, written as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.atomic import write_text
from fastmoco.distributed.collectives import gather
from fastmoco.distributed.world import World

Row = dict[str, Any]


class History:
    """The losses of the steps since the last read, as a (capacity, columns) float64 tensor on the device.

    A row's columns are the mean over its micro-batches of `loss` (the sum), each named part, `top1` and `top5`: the
    shares of queries with no and with fewer than five negatives more similar than their key, and `embedding_std`: the
    standard deviation of the normalised query embeddings over the batch, averaged over dimensions and multiplied by
    sqrt(D), so that 1 is a uniform spread over the sphere and 0 is collapse.
    """

    def __init__(self, names: Sequence[str], capacity: int, world: World) -> None:
        self.columns = ["loss", *names, "top1", "top5", "embedding_std"]
        self._world = world
        self._values = torch.zeros(capacity, len(self.columns), dtype=torch.float64, device=world.device)
        self._rows = 0

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], query: Tensor, rank: Tensor, *, divisor: int) -> None:
        """Add a micro-batch's losses, divided by `divisor`, to the current row.

        `query` (N, D) normalised, `rank` (N,) negatives more similar than the key.
        """
        parts = torch.stack([value.detach().double() for value in losses.values()])
        spread = query.std(dim=0, unbiased=False).mean().double() * query.shape[1] ** 0.5
        found = torch.stack([(rank < places).double().mean() for places in (1, 5)])
        self._values[self._rows] += torch.cat([parts.sum()[None], parts, found, spread[None]]) / divisor

    def next_row(self) -> None:
        """End the current row: the step is done."""
        self._rows += 1

    def read(self) -> list[dict[str, float]]:
        """The rows since the last read, means over all processes, on the host: here alone a step's metrics synchronise.

        Every process calls it after the same step, and has the same rows.
        """
        every = gather(self._world, self._values[: self._rows], kind="metrics")
        rows = every.view(self._world.size, self._rows, len(self.columns)).mean(dim=0).tolist()
        self._values.zero_()
        self._rows = 0
        return [dict(zip(self.columns, row, strict=True)) for row in rows]


class MetricsFile:
    """`metrics.jsonl` of a run: one line a step, in the order of the steps.

    Rows that cannot be written, to a full disk say, are kept and written with later ones; `warn` is told once.
    """

    def __init__(self, path: Path, *, resume_at: int, warn: Callable[[str], None] = print) -> None:
        self.path = path
        self.warn = warn
        # A killed run may have written rows past the checkpoint that it resumes from.
        kept = [row for row in read_rows(path) if row["step"] <= resume_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        # Unbuffered: what a failed write left over is known, and nothing is written twice.
        self._stream = path.open("ab", buffering=0)
        self._left = b""
        self._lock = threading.Lock()
        self._warned = False

    def write(self, rows: Sequence[Row]) -> None:
        """Append `rows`."""
        with self._lock:
            for row in rows:
                # JSON knows no NaN or infinity: null stands for both.
                finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
                self._left += json.dumps(finite).encode() + b"\n"
        try:
            self._write_left()
        except OSError as error:
            if not self._warned:
                self.warn(f"warning: {self.path} could not be written: {error}; its rows are kept and written later")
            self._warned = True

    def _write_left(self) -> None:
        with self._lock:
            while self._left:
                self._left = self._left[self._stream.write(self._left) :]

    def sync(self) -> None:
        """Bring what was written to the disk, from any thread. Raises OSError where that fails."""
        self._write_left()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file. Raises OSError where rows are left that cannot be written."""
        try:
            self._write_left()
        finally:
            self._stream.close()


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics file; [] where there is none. A line cut short by a kill ends the list."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
