"""What a process and all that it started have used: processor time and memory, read from /proc (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def descendants() -> list[int]:
    """The processes that this one started, and those that they started."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        tasks = Path(f"/proc/{waiting.pop()}/task")
        try:
            children = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
        except OSError:
            # It has ended meanwhile.
            continue
        found += children
        waiting += children
    return found


def cpu_seconds() -> float:
    """Processor seconds, user and system, of this process and its descendants so far, those that ended included."""
    return sum(_cpu_ticks(pid) for pid in (os.getpid(), *descendants())) / _TICKS


def memory_bytes() -> int:
    """Memory in use by this process and its descendants; a page that n processes share counts once among them.

    The proportional set size: with resident sizes, every worker of a forked pool would count the libraries again.
    """
    return sum(_proportional_bytes(pid) for pid in (os.getpid(), *descendants()))


def _cpu_ticks(pid: int) -> int:
    """utime, stime and, of its children that were waited for, cutime and cstime."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything.
    return sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
