"""Whole pipelines compared fairly: each in a process of its own, one at work at a time, in turns of a few seconds."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from bench.process import cpu_seconds, peak_bytes, restart_peak


class Missing(Exception):
    """Why a contestant is left out here."""


@dataclass(frozen=True)
class Turn:
    """One turn: `pairs` in `seconds`, of which `waited` for data; processor seconds; bytes in use at its peak.

    `first` is the time from opening to the first item, in seconds. The opening and the first items are not in the
    rest but the peak.
    """

    pairs: int
    seconds: float
    waited: float
    cpu: float
    first: float
    peak: int


def take_turn(
    opened: AbstractContextManager[Iterator[Any]],
    use: Callable[[Any], int],
    *,
    seconds: float,
    burst: int,
    untimed: float = 0.0,
    finish: Callable[[], None] = lambda: None,
) -> Turn:
    """Open a pipeline, give each item to `use` (which returns its pairs) for about `seconds`, and close it.

    Worker processes hand over their items in bursts of `burst`: one goes by untimed, and the time ends with one. More
    go by until `untimed` seconds have passed since the first item: what is opened first fills what it keeps ready.
    `finish` waits for what `use` has started.
    """
    restart_peak()
    began = time.perf_counter()
    with opened as items:
        use(next(items))
        first = time.perf_counter() - began
        gone = 1
        while gone % burst or time.perf_counter() < began + first + untimed:
            use(next(items))
            gone += 1
        finish()
        pairs = taken = 0
        waited = 0.0
        cpu, start = cpu_seconds(), time.perf_counter()
        while time.perf_counter() < start + seconds or taken % burst:
            asked = time.perf_counter()
            item = next(items)
            waited += time.perf_counter() - asked
            pairs += use(item)
            taken += 1
        finish()
        spent = time.perf_counter() - start
        return Turn(pairs, spent, waited, cpu_seconds() - cpu, first, peak_bytes())


def summary(turns: Sequence[Turn]) -> dict[str, float]:
    """Medians over turns, with the 20th and 80th percentile of the speed. `first_s` is the first turn's, cold."""
    speeds = [turn.pairs / turn.seconds for turn in turns]
    slow, median, fast = np.percentile(speeds, (20, 50, 80)).tolist()
    return {
        "pairs_per_s": median,
        "slow_pairs_per_s": slow,
        "fast_pairs_per_s": fast,
        "cpu_ms_per_pair": float(np.median([1e3 * turn.cpu / turn.pairs for turn in turns])),
        "waiting": float(np.median([turn.waited / turn.seconds for turn in turns])),
        "peak_mb": max(turn.peak for turn in turns) / 2**20,
        "first_s": turns[0].first,
        "again_s": float(np.median([turn.first for turn in turns[1:] or turns])),
        "turns": len(turns),
    }


class Contestant:
    """An object that lives in another process: `ask` calls its methods there.

    The processes are forked from one that has imported `preload` and done nothing else, so that none inherits
    threads, and what they share counts for each alike. Raises Missing as `build` does.
    """

    def __init__(self, build: Callable[..., object], *args: object, preload: Sequence[str] = ("torch",)) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self._pipe, there = context.Pipe()
        # Not a daemon: it may have workers.
        self._process = context.Process(target=_serve, args=(there, build, args))
        self._process.start()
        there.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *args: object) -> Any:
        """What `method` returns there. Raises RuntimeError with the traceback of whatever it raises."""
        self._pipe.send((method, args))
        return self._answer()

    def close(self) -> None:
        """End the process. May be called more than once."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contestant's process ended by itself: killed, perhaps for want of memory") from None
        if kind == "missing":
            raise Missing(value)
        if kind == "failed":
            raise RuntimeError(value)
        return value


def _serve(pipe: Connection, build: Callable[..., object], args: tuple[object, ...]) -> None:
    """Build the contestant and answer calls until the other end closes."""
    # What this process's workers would inherit is how it was itself started; theirs is to be the platform's own way.
    multiprocessing.set_start_method("fork", force=True)
    try:
        contestant = build(*args)
    except Missing as reason:
        pipe.send(("missing", str(reason)))
        return
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
        return
    pipe.send(("built", None))
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", getattr(contestant, method)(*given)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def rounds(contestants: dict[str, Contestant], method: str, *args: object, count: int) -> dict[str, list[Turn]]:
    """`count` rounds in which each contestant takes one turn, so that all meet the same disturbances."""
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, contestant in contestants.items():
            turns[name].append(contestant.ask(method, *args))
    return turns


def as_rows(turns: Sequence[Turn]) -> list[dict[str, float]]:
    """Every turn, for the file that keeps all that was measured."""
    return [asdict(turn) for turn in turns]
