"""What a process and all that it started have used: processor time and memory, read from /proc (Linux)."""

from __future__ import annotations

import contextlib
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


def restart_peak() -> None:
    """Have `peak_bytes` forget what was in use before. A process whose kernel refuses keeps its peak so far."""
    for pid in (os.getpid(), *descendants()):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory in use at once since `restart_peak`, by the kernel's own count, which disturbs nothing.

    This process's greatest resident set (VmHWM), libraries included, and of each descendant what it has for itself
    (Private_Clean, Private_Dirty) and what it had freed since its own peak (VmHWM - VmRSS): a worker of a forked pool
    shares its libraries with this process, which counts them. What other processes map makes no difference. An upper
    bound but for what descendants share with each other alone, as the processes' peaks need not fall together.
    """
    return _kilobytes(f"/proc/{os.getpid()}/status").get("VmHWM", 0) * 1024 + sum(map(_own_peak_bytes, descendants()))


def _cpu_ticks(pid: int) -> int:
    """utime, stime and, of its children that were waited for, cutime and cstime."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything.
    return sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])


def _own_peak_bytes(pid: int) -> int:
    rollup, status = _kilobytes(f"/proc/{pid}/smaps_rollup"), _kilobytes(f"/proc/{pid}/status")
    own = rollup.get("Private_Clean", 0) + rollup.get("Private_Dirty", 0)
    return (own + status.get("VmHWM", 0) - status.get("VmRSS", 0)) * 1024


def _kilobytes(path: str) -> dict[str, int]:
    """The lines of a file of /proc that end in kB, by name; none of a process that has ended meanwhile."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
