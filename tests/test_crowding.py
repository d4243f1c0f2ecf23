"""What is told of other work that takes the processors, and of what is the run's own doing."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from fastmoco.train import crowding
from fastmoco.train.crowding import Crowding


@pytest.mark.parametrize(
    ("threads", "seconds", "used", "interruptions", "said"),
    [
        (2, 10.0, 4.0, 2000, "2 threads, which wait for each other, had the time of 0.4; OMP_NUM_THREADS=1 is likely"),
        (2, 10.0, 19.0, 2000, None),
        (2, 10.0, 4.0, 150, None),
        (2, 4.0, 1.0, 2000, None),
        (1, 10.0, 3.0, 2000, None),
        (
            16,
            10.0,
            90.0,
            2000,
            "16 threads, which wait for each other, had the time of 9.0; OMP_NUM_THREADS=9",
        ),
        (64, 10.0, 90.0, 3000, None),
    ],
)
def test_what_is_told(
    threads: int, seconds: float, used: float, interruptions: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where threads want time and do not get it; not where they wait for images, in short intervals, nor of one."""
    clock = [100.0, 7.0, 40]
    monkeypatch.setattr(crowding, "_now", lambda: tuple(clock))
    watch, told = Crowding(threads), []
    for _ in range(2):
        clock[:] = clock[0] + seconds, clock[1] + used, clock[2] + interruptions
        told.append(watch.read())
        if said is None:
            break
    assert told[0] is None if said is None else told[0] is not None and said in told[0]
    assert told[1:] in ([], [None]), "once"


def test_short_intervals_add_up_and_what_is_between_them_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0, 0.0, 0]
    monkeypatch.setattr(crowding, "_now", lambda: tuple(clock))
    watch, found = Crowding(2), []
    for _ in range(3):
        clock[:] = clock[0] + 2.0, clock[1] + 0.8, clock[2] + 400
        found.append(watch.read())
        # A checkpoint, alone.
        clock[:] = clock[0] + 60.0, clock[1] + 120.0, clock[2]
        watch.restart()
    assert found[:2] == [None, None] and found[2] is not None and "the time of 0.4;" in found[2]


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_system_counts_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another on one processor, a process has half of it and is interrupted all the time."""
    monkeypatch.setattr(crowding, "LEAST", 0.5)
    # How long a turn is, and how many others have theirs between, is the system's affair.
    monkeypatch.setattr(crowding, "MOST_INTERRUPTIONS", 2.5)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    other = multiprocessing.get_context("fork").Process(target=_spin, args=(3,))
    other.start()
    try:
        watch = Crowding(2)
        _spin(2.0)
        assert watch.read() is not None
    finally:
        os.sched_setaffinity(0, everywhere)
        other.terminate()
        other.join()
