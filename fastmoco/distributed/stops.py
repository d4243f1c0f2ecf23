"""A process that is stopped for a while, by Ctrl-Z or by SLURM, and goes on: none of it is a hang."""

from __future__ import annotations

import faulthandler
import signal
import socket
import threading
import time
from types import FrameType

_CLOSE = b"\0"


class RunningClock:
    """Seconds as of time.monotonic that hardly pass while the process is stopped; called from any thread.

    It tells a stop by not having been called meanwhile: call it at least every `interval` seconds. Of a longer time
    between two calls, twice that counts and the rest does not, so that it never stands still on a busy machine.
    """

    def __init__(self, interval: float) -> None:
        self._most = 2 * interval
        self._lock = threading.Lock()
        self._called, self._stopped = time.monotonic(), 0.0

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._stopped += max(0.0, now - self._called - self._most)
            self._called = now
            return now - self._stopped


class Fuse:
    """Ends the process, with status 1 and where its threads stand, `seconds` after `light` was last called: also where
    C code never lets go of the interpreter, so that no thread of Python's runs.

    The time goes on while the process is stopped, and would end it as soon as it continues. Until `remove`, SIGTSTP is
    therefore obeyed by a thread here, which puts the fuse out, stops the process, and lights it anew when it continues.
    That is what Ctrl-Z sends, and `scontrol suspend` and SLURM's gang scheduling some seconds before SIGSTOP. A SIGSTOP
    without it (or a frozen cgroup) cannot be foreseen: for longer than `seconds` it ends the process.

    So it is where this is made in the main thread, and SIGTSTP has its usual meaning and no other's wake-up file is
    set; otherwise signals are left alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self._listen()

    def light(self) -> None:
        """Begin the time anew."""
        with self._lock:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def remove(self) -> None:
        """Put it out, and have SIGTSTP stop the process as before; in the thread that made it."""
        if self._thread is not None:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._told.send(_CLOSE)
            self._thread.join()
            self._thread = None
            self._heard.close()
            self._told.close()
        faulthandler.cancel_dump_traceback_later()

    def _listen(self) -> None:
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        # The system's own handler writes the signal's number there, at once and whatever the main thread waits for,
        # be it another process that is stopped already. Python's would have to wait for it.
        other = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            self._heard.close()
            self._told.close()
            return
        signal.signal(signal.SIGTSTP, _leave_to_thread)
        self._thread = threading.Thread(target=self._obey, name="stops", daemon=True)
        self._thread.start()

    def _obey(self) -> None:
        while (said := self._heard.recv(1024)) and _CLOSE not in said:
            if signal.SIGTSTP in said:
                with self._lock:
                    faulthandler.cancel_dump_traceback_later()
                    # To this very thread, which then goes no further before the process continues.
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                    faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    pass
