"""Ending a run as a whole: where one of its processes fails, dies or hangs, all of them say so and end.

Each process has a thread that tells rank 0 every second how it is, over connections of its own: what torch.distributed
waits for, it does not. So it can also end a process whose main thread waits for ever. Time in which the process itself
was stopped is none in which it did not get on (stops.py).
"""

from __future__ import annotations

import faulthandler
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastmoco.distributed.beats import Hub, Spoke
from fastmoco.distributed.launch import Launch
from fastmoco.distributed.roll import Pulse, Roll, Verdict
from fastmoco.distributed.stops import Fuse, RunningClock
from fastmoco.distributed.world import World
from fastmoco.errors import UserError

# Exit statuses of a process that ends because of another, or because nothing got on any more.
OTHER_FAILED = 75
HUNG = 76

# Seconds between two words; until all of a run's processes have failed alike or not; and until a machine that does not
# answer is given up, which is also how long the cause of a broken connection is waited for, and all others where one
# ends by a UserError.
INTERVAL, GRACE, PATIENCE = 1.0, 1.0, 12.0
# Seconds that rank 0, once it is done, waits for the others to be done too.
LINGER = 10.0
# Seconds over the watchdog after which a process ends that cannot even say that it hangs.
SPARE = 30.0

# What torch says on one process when another has gone.
_BROKEN = re.compile(
    r"Connection (closed|reset)|Broken pipe|Timed out|timed out|gloo|NCCL|c10d|ProcessGroup|TCPStore|Socket", re.I
)


class _Own:
    """What this process has to say of itself; called from any thread."""

    def __init__(self, world: World, clock: RunningClock) -> None:
        self.pulse = Pulse(world.rank, world.host, os.getpid())
        self.clock = clock
        self.moved: float | None = None
        self._thread = threading.get_ident()

    def __call__(self) -> Pulse:
        idle = 0.0 if self.moved is None else self.clock() - self.moved
        return replace(self.pulse, idle=idle, where=_where(self._thread))


class Monitor:
    """This process's part in the watch; `beat` and `alive` are for its main thread."""

    def __init__(
        self, own: _Own, link: Hub | Spoke, fuse: Fuse, *, interval: float, grace: float, patience: float
    ) -> None:
        self._own, self._pulse = own, own.pulse
        self._link, self._fuse = link, fuse
        self._interval, self._grace, self._patience = interval, grace, patience
        self._over = threading.Event()
        self._verdict: Verdict | None = None
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """`step` steps are done. The watchdog counts from the first call on: what comes before may take as it likes."""
        self._pulse.step = step
        self.alive()

    def alive(self) -> None:
        """Something got on that is no step, in a phase that may last longer than the watchdog allows for one."""
        self._own.moved = self._own.clock()

    def leave(self) -> None:
        """End the watch in good order: this process's end is then no failure to the others.

        Rank 0 waits some seconds for the others, whose failures are still its own until then.
        """
        self._pulse.ended = True
        self._link.wake()
        if isinstance(self._link, Hub):
            until = time.monotonic() + LINGER
            while not self._link.roll.others_ended and time.monotonic() < until and not self._over.is_set():
                time.sleep(0.01)
        self._close()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends by `error`, before it does.

        Where another one's end was the cause, this does not return: that is printed, and the process ends. Where all
        fail alike by a UserError, SystemExit replaces it everywhere but on rank 0, so that it is printed once.
        """
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if _may_follow(error) and not (isinstance(self._link, Hub) and self._link.alone):
            self._pulse.hurt = said
        else:
            self._pulse.mistake = isinstance(error, UserError)
            self._pulse.failed = said
        self._link.wake()
        self._over.wait(self._patience + 3 * (self._grace + self._interval))
        self._close()
        if self._verdict is not None and self._verdict.alike and self._pulse.rank and isinstance(error, UserError):
            raise SystemExit(2) from error

    def _close(self) -> None:
        self._over.set()
        self._link.wake()
        self._thread.join()
        self._fuse.remove()
        self._link.part(self._grace)

    def _watch(self) -> None:
        while True:
            over = self._over.is_set()
            # Where some C code never lets go of the interpreter, only this can end the process.
            self._fuse.light()
            # What was said last is said, but nothing more is waited for.
            verdict = self._link.turn(0.0 if over else self._interval)
            if verdict is not None:
                self._act(verdict)
                return
            if over:
                return

    def _act(self, verdict: Verdict) -> None:
        own = self._pulse.failed or (self._pulse.hurt and verdict.rank == self._pulse.rank)
        if own or (self._pulse.ended and not isinstance(self._link, Hub)):
            self._verdict = verdict
            self._over.set()
            return
        if isinstance(self._link, Hub):
            self._link.part(self._grace)
        _end(verdict)


def _end(verdict: Verdict) -> None:
    """Print the verdict and end this process, whatever its main thread is waiting for."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    if os.isatty(1):
        # The progress bar has hidden the cursor.
        os.write(1, b"\x1b[?25h\n")
    if verdict.hung:
        os.write(2, b"where the threads of this process stand:\n")
        faulthandler.dump_traceback(file=2, all_threads=True)
    os.write(2, f"error: {verdict.text}\n".encode(errors="backslashreplace"))
    os._exit(HUNG if verdict.hung else OTHER_FAILED)


def _where(thread: int) -> str:
    """The line that a thread is at, and the innermost one of this package that led there."""
    frame = sys._current_frames().get(thread)
    shown: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not shown or "fastmoco" in path.parts[-3:-1]:
            shown.append(f"{frame.f_code.co_name} ({path.name}:{frame.f_lineno})")
            if "fastmoco" in path.parts[-3:-1]:
                break
        frame = frame.f_back
    return " called by ".join(shown)


def _may_follow(error: BaseException) -> bool:
    """Whether `error` may be what another process's end looks like from here."""
    for one in (error, error.__cause__, error.__context__):
        if isinstance(one, dist.DistError) or (isinstance(one, RuntimeError) and _BROKEN.search(str(one))):
            return True
    return False


@contextmanager
def watched(
    world: World,
    launch: Launch,
    seconds: float,
    *,
    orderly: tuple[type[BaseException], ...] = (),
    interval: float = INTERVAL,
    grace: float = GRACE,
    patience: float = PATIENCE,
    spare: float = SPARE,
) -> Iterator[Monitor]:
    """Watch over this process, and over the others of its world, while it is open.

    seconds: the watchdog, how long no process may get on. orderly: exceptions that every process raises alike, as
    agreed, and prints or not by itself. The other times are those of this module's constants, in seconds.

    Where another process fails, dies or can no longer be reached, or where nothing gets on, one line says so and this
    process ends at once, with status OTHER_FAILED or HUNG. Raises UserError where rank 0 cannot be connected to.

    A process that is stopped and continued, and all of a run together, go on where they were, however long it took.
    Only a SIGSTOP that no SIGTSTP precedes, longer than the watchdog and `spare` together, ends a process (see Fuse).
    Collectives of the world's group have no timeout of their own from then on.
    """
    if world.group is not None:
        # It would go on while the processes are stopped. Who is gone, or hangs, is seen here.
        dist.set_timeout(timedelta(days=7), world.group)
    own = _Own(world, RunningClock(interval))
    link = _link(own, world, launch, seconds, grace, patience)
    monitor = Monitor(own, link, Fuse(seconds + spare), interval=interval, grace=grace, patience=patience)
    try:
        yield monitor
    except orderly:
        monitor.leave()
        raise
    except BaseException as error:
        monitor.fail(error)
        raise
    monitor.leave()


def _link(
    own: _Own, world: World, launch: Launch, seconds: float, grace: float, patience: float
) -> Hub | Spoke:
    token = secrets.randbits(62)
    if world.first:
        roll = Roll(world.size, seconds, grace, patience, own.clock())
        hub = Hub(own, roll, token, own.clock, others=not world.alone)
        if not world.alone:
            _agree(world, hub.port, token)
        return hub
    port, token = _agree(world, 0, 0)
    try:
        return Spoke(own, launch.address, port, token, own.clock, seconds=seconds, patience=patience)
    except OSError as error:
        raise UserError(
            f"rank {world.rank} on {world.host} cannot connect to rank 0 at {launch.address}:{port}: {error}; open the "
            "ports between the machines of the run"
        ) from error


def _agree(world: World, port: int, token: int) -> tuple[int, int]:
    """Rank 0's port and token, on every rank."""
    told = torch.tensor([port, token], dtype=torch.int64)
    dist.broadcast(told, 0, group=world.control)
    return int(told[0]), int(told[1])
