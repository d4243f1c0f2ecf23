"""How fast a run goes, and how much of its time it waits for images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from fastmoco.data.loader import Batch
from fastmoco.train.metrics import Row


class Clock:
    """Wall time between logging steps, and the share of it spent waiting for the loader."""

    def __init__(self, pairs: int) -> None:
        self.restart(pairs)

    def restart(self, pairs: int) -> None:
        """Begin a new interval, `pairs` having been trained on before it."""
        self._pairs, self._since, self._waited = pairs, time.perf_counter(), 0.0

    def timing(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield from `loader`, counting the time it takes."""
        iterator = iter(loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def read(self, pairs: int) -> Row:
        """Speed and waiting of the interval, `pairs` having been trained on at its end."""
        elapsed = time.perf_counter() - self._since
        return {"pairs_per_s": (pairs - self._pairs) / elapsed, "data_wait": self._waited / elapsed}
