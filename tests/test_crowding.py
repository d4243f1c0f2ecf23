"""What is told of other work that takes the processors, and of what is the run's own doing."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from fastmoco.train import crowding
from fastmoco.train.crowding import Crowding


@pytest.mark.parametrize(
    ("threads", "seconds", "used", "interruptions", "told"),
    [
        (2, 10.0, 4.0, 2000, True),
        (2, 10.0, 19.0, 2000, False),
        (2, 10.0, 4.0, 150, False),
        (2, 4.0, 1.0, 2000, False),
        (1, 10.0, 3.0, 2000, False),
        (16, 10.0, 90.0, 2000, True),
    ],
)
def test_what_is_told(
    threads: int, seconds: float, used: float, interruptions: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where threads want time and do not get it; not where they wait for images, in short intervals, nor of one."""
    found = [(100.0, 7.0, 40), (100.0 + seconds, 7.0 + used, 40 + interruptions)]
    monkeypatch.setattr(crowding, "_now", lambda: found.pop(0) if len(found) > 1 else found[0])
    watch = Crowding(threads)
    said = watch.read()
    assert (said is not None) is told
    if said is not None:
        assert f"{threads} threads" in said and f"{used / seconds:.1f};" in said and "OMP_NUM_THREADS=1" in said
        assert watch.read() is None, "once"


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_system_counts_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another on one processor, a process has half of it and is interrupted all the time."""
    monkeypatch.setattr(crowding, "LEAST", 0.5)
    # How long a turn is, and how many others have theirs between, is the system's affair.
    monkeypatch.setattr(crowding, "MOST_INTERRUPTIONS", 5.0)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    other = multiprocessing.get_context("fork").Process(target=_spin, args=(3,))
    try:
        other.start()
        watch = Crowding(2)
        _spin(2.0)
        assert watch.read() is not None
    finally:
        os.sched_setaffinity(0, everywhere)
        other.terminate()
        other.join()
