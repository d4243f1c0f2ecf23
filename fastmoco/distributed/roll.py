"""Who of a run's processes is alive, from what each says of itself, and what it means when one is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AGAIN = "go on with --resume"


@dataclass
class Pulse:
    """What a process says of itself, several times a minute.

    step: steps done; None before the first word. idle: seconds since it last got on. where: the line of code that its
    main thread is at. failed: the exception that it ends by; mistake: whether that is one for people to mend, which all
    are likely to find. hurt: an exception that may follow from another's end. ended: whether it ends in good order.
    """

    rank: int
    host: str = "?"
    pid: int = 0
    step: int | None = None
    idle: float = 0.0
    where: str = ""
    failed: str = ""
    mistake: bool = False
    hurt: str = ""
    ended: bool = False

    @classmethod
    def of(cls, said: Any) -> Pulse:
        """The pulse in a message. Raises ValueError where it is none."""
        try:
            pulse = cls(**said)
            return cls(
                int(pulse.rank), str(pulse.host), int(pulse.pid), None if pulse.step is None else int(pulse.step),
                float(pulse.idle), str(pulse.where), str(pulse.failed), bool(pulse.mistake), str(pulse.hurt),
                bool(pulse.ended),
            )  # fmt: skip
        except TypeError as error:
            raise ValueError(f"no pulse: {error}") from error

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass
class Verdict:
    """Why the run ends: `text` for people; `rank` is whose failure it is, None where all failed `alike` or hung."""

    text: str
    rank: int | None = None
    hung: bool = False
    alike: bool = False


def since(step: int | None) -> str:
    """When something happened, after `step` steps."""
    return "before the first step" if step is None else f"after step {step}"


def gone(pulse: Pulse, step: int | None, why: str = "") -> Verdict:
    """The verdict on a process whose connection ended; `why` is what the system said, nothing where it was closed.

    step: how far another process of the run is, all going in step: what is known of the one that is gone is older.
    """
    if why:
        what = f"can no longer be reached {since(step)} ({why}): its machine or the network to it is down"
    else:
        what = f"ended without a word {since(step)}: killed, or out of memory?"
    return Verdict(f"{pulse} {what}; {AGAIN}", pulse.rank)


@dataclass
class _Known:
    pulse: Pulse
    heard: float
    ended_at: float | None = None
    lost: str | None = None
    spoke: bool = False

    @property
    def steps(self) -> int:
        """Steps done, -1 before the first word."""
        return -1 if self.pulse.step is None else self.pulse.step


@dataclass
class Roll:
    """All processes of a run as one of them knows them, and the verdict once the run has to end. Times in seconds.

    seconds: how long none of them may get on. grace: how long others are waited for once one failed, which may all do
    so alike. patience: how long the cause of an exception that may be another's is waited for, and the others where one
    found a mistake: they may have more to finish before they end by it.
    """

    size: int
    seconds: float
    grace: float
    patience: float
    began: float
    known: dict[int, _Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {rank: _Known(Pulse(rank), self.began) for rank in range(self.size)}

    def heard(self, pulse: Pulse, now: float) -> None:
        """Take note of what a process said at time `now`."""
        known = self.known[pulse.rank]
        known.pulse, known.heard, known.spoke = pulse, now, True
        if known.ended_at is None and (pulse.failed or pulse.hurt or pulse.ended):
            known.ended_at = now

    def lost(self, rank: int, why: str = "") -> None:
        """Take note that the connection to a process ended; expected of one that has said that it ends."""
        known = self.known[rank]
        if not (known.pulse.ended or known.pulse.failed):
            known.lost = why if known.lost is None else known.lost

    @property
    def others_ended(self) -> bool:
        """Whether every process but rank 0 has ended in good order."""
        return all(known.pulse.ended for rank, known in self.known.items() if rank)

    @property
    def reached(self) -> int | None:
        """The steps that some process has done."""
        return max((known.steps for known in self.known.values() if known.steps >= 0), default=None)

    def verdict(self, now: float) -> Verdict | None:
        """Why the run has to end at time `now`, if it has to."""
        everyone = list(self.known.values())
        for known in everyone:
            if known.lost is not None:
                return gone(known.pulse, self.reached, known.lost)
        ended = sorted((k for k in everyone if k.ended_at is not None), key=lambda k: k.ended_at or 0.0)
        failed = [known for known in ended if known.pulse.failed]
        if failed:
            over = all(known.pulse.failed or known.pulse.ended for known in everyone)
            grace = self.patience if failed[0].pulse.mistake else self.grace
            if over or now - (failed[0].ended_at or now) >= grace:
                return self._failed(failed, failed[0].pulse.failed)
            return None
        hurt = [known for known in ended if known.pulse.hurt]
        if hurt and now - (hurt[0].ended_at or now) >= self.patience:
            return self._failed(hurt, hurt[0].pulse.hurt)
        return self._hung([known for known in everyone if not known.pulse.ended], now)

    def _failed(self, failed: list[_Known], why: str) -> Verdict:
        first = failed[0].pulse
        alike = all(known.pulse.failed == why for known in self.known.values())
        return Verdict(f"{first} failed {since(first.step)}: {why}; {AGAIN}", first.rank, alike=alike)

    def _hung(self, running: list[_Known], now: float) -> Verdict | None:
        # The end of one in good order is a sign of life too: the others may have got on by its signs alone till then.
        idle = [
            known.pulse.idle + now - known.heard if known.ended_at is None else now - known.ended_at
            for known in self.known.values()
        ]
        if not running or min(idle) <= self.seconds:
            return None
        silent = [known for known in running if now - known.heard > self.seconds / 2]
        last = min(known.steps for known in running)
        behind = [known for known in running if known.steps == last]
        named = "; ".join(_standing(known, now, silent) for known in (silent or behind))
        return Verdict(
            f"nothing got on for {min(idle):.0f} s {since(self.reached)} (--watchdog): {named}; {AGAIN}", hung=True
        )


def _standing(known: _Known, now: float, silent: list[_Known]) -> str:
    pulse = known.pulse
    if not known.spoke:
        return f"rank {pulse.rank} never reported"
    if known in silent:
        return f"{pulse} was last heard from {now - known.heard:.0f} s ago, {since(pulse.step)}: stopped, or frozen?"
    return f"{pulse} stands {since(pulse.step)}{', in ' if pulse.where else ''}{pulse.where}"
