"""What falls due by the clock where steps are slow, before it would by their number."""

from __future__ import annotations

import math
import time

# Seconds that somebody who watches is left without a line of metrics.
LINE_SECONDS = 60.0

NOTHING, LINE, SAVE = range(3)


class Due:
    """Whether a line of metrics, or a checkpoint with one, is due: LINE_SECONDS, or `minutes`, after the last.

    `minutes` 0: no checkpoint falls due by the clock. Clocks differ, so that one process decides for all.
    """

    def __init__(self, minutes: float) -> None:
        self._save_seconds = 60 * minutes or math.inf
        self.restart(saved=True)

    def restart(self, *, saved: bool) -> None:
        """A line was written, or a checkpoint with one."""
        self._line = time.monotonic()
        if saved:
            self._save = self._line

    def read(self) -> int:
        """SAVE, LINE or NOTHING."""
        now = time.monotonic()
        if now - self._save >= self._save_seconds:
            return SAVE
        return LINE if now - self._line >= LINE_SECONDS else NOTHING
