"""How the processes of a run hear of each other: rank 0 is the hub that all others connect to."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from fastmoco.distributed.lines import Closed, Line
from fastmoco.distributed.roll import Pulse, Roll, Verdict, gone, since


class _Selecting:
    """Waiting for connections, and for `wake` from another thread."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self.selector.register(self._woken, selectors.EVENT_READ)

    def wake(self) -> None:
        """End the wait of the thread that is in `turn`."""
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def wait(self, seconds: float) -> tuple[list[object], bool]:
        """What can be read within that time, and whether `wake` was called."""
        ready = [key.fileobj for key, _ in self.selector.select(max(0.0, seconds))]
        if self._woken not in ready:
            return list(ready), False
        self._woken.recv(1024)
        return [one for one in ready if one is not self._woken], True

    def close(self) -> None:
        """Close what is waited for."""
        self.selector.close()
        self._woken.close()
        self._waker.close()


class Hub:
    """Rank 0's end: hears all, and tells all the verdict. Without `others` there is nothing to connect to.

    own: gives what this process has to say of itself at that moment. token: what a connection has to say first, so that
    no stranger is taken for a rank. clock: the seconds that `roll` counts in.
    """

    def __init__(
        self, own: Callable[[], Pulse], roll: Roll, token: int, clock: Callable[[], float], *, others: bool = True
    ) -> None:
        self.own = own
        self.roll = roll
        self.token = token
        self.clock = clock
        self._waiting = _Selecting()
        self.wake = self._waiting.wake
        self._ranks: dict[Line, int | None] = {}
        self._listener: socket.socket | None = None
        if others:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
            self._listener.setblocking(False)
            self._waiting.selector.register(self._listener, selectors.EVENT_READ)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to hear."""
        return self._listener is None

    @property
    def port(self) -> int:
        """Where the others connect to; 0 without others."""
        return int(self._listener.getsockname()[1]) if self._listener is not None else 0

    def turn(self, seconds: float) -> Verdict | None:
        """Say and hear what there is for that time, or until woken or there is a verdict, which all are told."""
        until = time.monotonic() + seconds
        self._tell({"first": asdict(self.own())})
        while True:
            ready, woken = self._waiting.wait(until - time.monotonic())
            for one in ready:
                self._accept() if one is self._listener else self._hear(one)  # type: ignore[arg-type]
            now = self.clock()
            self.roll.heard(self.own(), now)
            verdict = self.roll.verdict(now)
            if verdict is not None:
                self._tell({"verdict": asdict(verdict)})
            if verdict is not None or woken or time.monotonic() >= until:
                return verdict

    def part(self, seconds: float) -> None:
        """Tell all that nothing more will come, and wait until they have closed, so that they read all of it."""
        self._tell({"bye": True})
        for line in self._ranks:
            line.end()
        until = time.monotonic() + seconds
        while self._ranks and time.monotonic() < until:
            for one in self._waiting.wait(until - time.monotonic())[0]:
                if isinstance(one, Line):
                    self._hear(one)
        for line in list(self._ranks):
            self._drop(line)
        if self._listener is not None:
            self._listener.close()
        self._waiting.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            line = Line(self._listener.accept()[0], self.roll.patience)
            self._ranks[line] = None
            self._waiting.selector.register(line, selectors.EVENT_READ)

    def _hear(self, line: Line) -> None:
        why = ""
        try:
            for said in line.receive():
                if said.pop("token", None) != self.token:
                    raise OSError("no rank of this run")
                pulse = Pulse.of(said)
                if not 0 < pulse.rank < self.roll.size:
                    raise OSError("no rank of this run")
                if self._ranks[line] is None:
                    line.send({"first": asdict(self.own())})
                self._ranks[line] = pulse.rank
                self.roll.heard(pulse, self.clock())
            return
        except Closed:
            pass
        except (OSError, ValueError) as error:
            why = _why(error)
        rank = self._ranks[line]
        if rank is not None:
            self.roll.lost(rank, why)
        self._drop(line)

    def _drop(self, line: Line) -> None:
        del self._ranks[line]
        self._waiting.selector.unregister(line)
        line.close()

    def _tell(self, message: dict[str, object]) -> None:
        for line in self._ranks:
            # One that is lost is noticed where it is read from.
            with contextlib.suppress(OSError):
                line.send(message)


class Spoke:
    """Another rank's end: says how it is, and hears the verdict, or that rank 0 is gone.

    own: gives what this process has to say of itself at that moment. clock: seconds, of which rank 0 may be silent for
    `seconds`.
    """

    def __init__(
        self,
        own: Callable[[], Pulse],
        address: str,
        port: int,
        token: int,
        clock: Callable[[], float],
        *,
        seconds: float,
        patience: float,
    ) -> None:
        """Raises OSError where rank 0 cannot be connected to, or does not answer within `patience` seconds."""
        self.own = own
        self.token = token
        self.clock = clock
        self.seconds = seconds
        self._waiting = _Selecting()
        self.wake = self._waiting.wake
        self._line = Line(socket.create_connection((address, port), timeout=patience), patience)
        self._waiting.selector.register(self._line, selectors.EVENT_READ)
        self._first = Pulse(0, host=address)
        self._heard = clock()
        self._released = False
        # From here on each knows the other, should one of them be gone a moment later.
        if self.turn(patience, answered=True) is not None or self._first.pid == 0:
            raise OSError("no answer")

    def turn(self, seconds: float, *, answered: bool = False) -> Verdict | None:
        """Say and hear what there is for that time, or until woken, `answered` or there is a verdict."""
        until = time.monotonic() + seconds
        if not self._released:
            # Where rank 0 is gone, what it said last is still there to be read.
            with contextlib.suppress(OSError):
                self._line.send({"token": self.token, **asdict(self.own())})
        while True:
            ready, woken = self._waiting.wait(until - time.monotonic())
            verdict = self._hear() if self._line in ready else None
            now = self.clock()
            if verdict is None and not self._released and now - self._heard > self.seconds + 2 * seconds:
                verdict = Verdict(
                    f"{self._first} was last heard from {now - self._heard:.0f} s ago, {since(self._first.step)} "
                    "(--watchdog): stopped, or frozen?; go on with --resume",
                    hung=True,
                )
            if verdict is not None or woken or time.monotonic() >= until or (answered and self._first.pid):
                return verdict

    def part(self, seconds: float) -> None:
        """Have what was said reach rank 0, and close."""
        if not self._released:
            self._line.end()
            until = time.monotonic() + seconds
            while not self._released and time.monotonic() < until and self._hear() is None:
                self._waiting.wait(until - time.monotonic())
        self._line.close()
        self._waiting.close()

    def _hear(self) -> Verdict | None:
        try:
            for said in self._line.receive():
                self._heard = self.clock()
                if "verdict" in said:
                    return Verdict(**said["verdict"])
                if "bye" in said:
                    self._release()
                    return None
                self._first = Pulse.of(said["first"])
            return None
        except Closed:
            self._release()
            return gone(self._first, self.own().step)
        except OSError as error:
            self._release()
            return gone(self._first, self.own().step, _why(error))

    def _release(self) -> None:
        self._released = True
        self._waiting.selector.unregister(self._line)


def _why(error: OSError | ValueError) -> str:
    """What the system says of a lost connection; nothing where the other process ended, with something unread."""
    if isinstance(error, ConnectionResetError):
        return ""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
