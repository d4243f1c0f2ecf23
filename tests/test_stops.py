"""Runs that are stopped for longer than the watchdog, by Ctrl-Z or by SLURM, and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastmoco.distributed import stops
from fastmoco.distributed.launch import Launch
from fastmoco.distributed.monitor import HUNG, Monitor, watched
from fastmoco.distributed.stops import Fuse, RunningClock
from fastmoco.distributed.world import World
from ranks import Ranks, wait_for_ever

WATCHDOG, STOPPED = 2.0, 3.5


def steps_until_told(world: World, monitor: Monitor, folder: Path) -> None:
    """Steps of a hundredth of a second, each a byte of `done`, until `hang` is there; then the last rank hangs."""
    for step in range(1, 1_000_000):
        if not world.alone:
            dist.all_reduce(torch.ones(3), group=world.group)
        monitor.beat(step)
        if world.first:
            with (folder / "done").open("ab") as done:
                done.write(b".")
        if world.rank == world.size - 1 and (folder / "hang").exists():
            wait_for_ever()
        time.sleep(0.01)


def wait_until(true: Callable[[], bool], within: float = 60.0) -> None:
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize(
    ("size", "signals"),
    [(1, [signal.SIGTSTP]), (2, [signal.SIGSTOP]), (2, [signal.SIGTSTP, signal.SIGSTOP])],
    ids=["Ctrl-Z", "SIGSTOP", "as SLURM"],
)
def test_a_run_that_was_stopped_goes_on_and_is_watched_on(tmp_path: Path, size: int, signals: list[int]) -> None:
    ranks = Ranks(tmp_path, size, steps_until_told, seconds=WATCHDOG, timeout=WATCHDOG)

    def has_done(steps: int) -> bool:
        assert all(process.is_alive() for process in ranks.processes), ranks.errors()
        return (tmp_path / "done").exists() and (tmp_path / "done").stat().st_size >= steps

    wait_until(lambda: has_done(5))
    for number in signals:
        for rank in range(size):
            pid = ranks.signal(rank, number)
            wait_until(partial(is_stopped, pid))
            # The others then wait for it in a collective.
            time.sleep(0.2)
    time.sleep(STOPPED)
    done = (tmp_path / "done").stat().st_size
    for rank in range(size):
        ranks.signal(rank, signal.SIGCONT)
    wait_until(lambda: has_done(done + 30))

    (tmp_path / "hang").touch()
    assert ranks.end() == [HUNG] * size
    for said in ranks.errors():
        assert "nothing got on for 2 s" in said and "in wait_for_ever" in said


_FUSE = """
import ctypes, sys, threading
from fastmoco.distributed.stops import Fuse

system, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

def let_go():
    sys.stdin.readline()
    system.pthread_mutex_unlock(mutex)

threading.Thread(target=let_go).start()
system.pthread_mutex_lock(mutex)
fuse = Fuse(3.0)
fuse.light()
print("lit", flush=True)
# Unlike most waits, this is not interrupted by signals, so that no handler of Python's gets to run.
system.pthread_mutex_lock(mutex)
fuse.light()
print("went on", flush=True)
# Never lets go of the interpreter.
ctypes.PyDLL(None).sleep(60)
"""


def test_the_fuse_is_out_while_the_process_is_stopped() -> None:
    command = [sys.executable, "-c", _FUSE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "lit\n"
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: is_stopped(process.pid))
        time.sleep(4.0)
        process.send_signal(signal.SIGCONT)
        # A fuse that burnt on meanwhile ends it now.
        time.sleep(0.5)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "went on\n"
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Timeout" in said and "<string>" in said


def test_sigtstp_is_as_before_afterwards_and_left_alone_where_it_is_anothers() -> None:
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    with watched(World(), Launch("alone"), 60.0):
        assert signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        fuse = Fuse(60.0)
        os.kill(os.getpid(), signal.SIGTSTP)
        fuse.remove()
        assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def test_a_stop_is_two_intervals_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.5, 3600.0, 3601.0])
    monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = RunningClock(1.0)
    assert [clock(), clock(), clock()] == [11.5, 13.5, 14.5]
