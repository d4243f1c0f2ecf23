"""Stopping between two steps when asked to, rather than in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """From `begin` until it is left, the first SIGINT, SIGTERM or SIGUSR1 is kept in `signal`; a second SIGINT
    interrupts at once.

    SIGUSR1 is what SLURM is asked to send some minutes before a job's time is up; unhandled it would end the process.
    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._tell = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        return self

    def begin(self, *, tell: bool = False) -> None:
        """Keep signals from now on: before, there is nothing to save, and they end the process. With `tell` the first
        is answered at once on stderr: the step under way may take minutes more."""
        self._tell = tell
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None and self._tell:
            # Past Python's buffers, which the program may just be writing to.
            os.write(2, b"\nto stop: the step under way is ended and saved; Ctrl-C from now on ends at once\n")
        self.signal = number


def end_undisturbed() -> None:
    """Ignore SIGTERM and SIGUSR1 from now on, in a process that has only to end.

    srun sends SIGTERM to all processes as soon as one has failed, which would hide why the others end.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
