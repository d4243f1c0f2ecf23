"""Whether other work takes the processors from a run, which slows its threads far more than by its share."""

from __future__ import annotations

import resource
import time

# The share of its threads' time that a run has at least when it is alone, unless it waits: for images, or for a thread
# that has more to do. It does that by itself, so that its threads are then hardly interrupted (times a second, each).
LEAST_SHARE, MOST_INTERRUPTIONS = 0.6, 10.0
# What is shorter says little (seconds).
LEAST = 5.0


class Crowding:
    """Watches a process with `threads` threads that compute, and tells once what stands in their way."""

    def __init__(self, threads: int) -> None:
        self.threads, self.told = threads, False
        self._elapsed, self._used, self._interrupted = 0.0, 0.0, 0
        self.restart()

    def restart(self) -> None:
        """Leave out what has passed since the last reading."""
        self._last = _now()

    def read(self) -> str | None:
        """What to tell of the time that was not left out, if anything, once it is long enough; None ever after, and for
        a single thread, which waits for none."""
        before = self._last
        now, used, interrupted = self._last = _now()
        self._elapsed += now - before[0]
        self._used += used - before[1]
        self._interrupted += interrupted - before[2]
        if self.told or self.threads < 2 or self._elapsed < LEAST:
            return None
        share, often = self._used / self._elapsed, self._interrupted / self._elapsed / self.threads
        self._elapsed, self._used, self._interrupted = 0.0, 0.0, 0
        if share >= LEAST_SHARE * self.threads or often <= MOST_INTERRUPTIONS:
            return None
        self.told = True
        return (
            f"warning: other work keeps the processors busy: this run's {self.threads} threads, which wait for each "
            f"other, had the time of {share:.1f}; OMP_NUM_THREADS={max(1, int(share))} is likely to be faster there"
        )


def _now() -> tuple[float, float, int]:
    """Time, processor time of the process, and how often it was interrupted by others."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
