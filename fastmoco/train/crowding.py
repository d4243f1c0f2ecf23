"""Whether other work takes the processors from a run, which slows its threads far more than by its share."""

from __future__ import annotations

import resource
import time

# The share of its threads' time that a run has at least when it is alone, unless it waits: for images, or for a thread
# that has more to do. It does that by itself, so that it is then hardly interrupted (times a second).
LEAST_SHARE, MOST_INTERRUPTIONS = 0.6, 20.0
# What is shorter says little (seconds).
LEAST = 5.0


class Crowding:
    """Watches a process with `threads` threads that compute, and tells once what stands in their way."""

    def __init__(self, threads: int) -> None:
        self.threads, self.told = threads, False
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._since, self._used, self._interrupted = _now()

    def read(self) -> str | None:
        """What to tell of the interval, if anything; None ever after, and for a single thread, which waits for none."""
        now, used, interrupted = _now()
        elapsed = now - self._since
        if self.told or self.threads < 2 or elapsed < LEAST:
            return None
        share = (used - self._used) / elapsed
        if share >= LEAST_SHARE * self.threads or (interrupted - self._interrupted) / elapsed <= MOST_INTERRUPTIONS:
            return None
        self.told = True
        return (
            f"warning: other work keeps the processors busy: this run's {self.threads} threads, which wait for each "
            f"other, had the time of {share:.1f}; OMP_NUM_THREADS=1 makes it faster there"
        )


def _now() -> tuple[float, float, int]:
    """Time, processor time of the process, and how often it was interrupted by others."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
