"""Watched processes of a test, and what they do until one fails, dies, hangs or is stopped."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastmoco.distributed.launch import Launch, joined
from fastmoco.distributed.monitor import Monitor, watched
from fastmoco.distributed.world import World
from worlds import free_port

QUICK: dict[str, float] = {"interval": 0.1, "grace": 0.5, "patience": 3.0}
Scenario = Callable[[World, Monitor, Path], None]


class Agreed(Exception):
    """What all ranks raise in good order."""


class Ranks:
    """`size` processes that run one scenario in a world of theirs, each with its error output in a file.

    seconds: the watchdog. timeout: seconds that a collective may take until the processes are watched.
    """

    def __init__(
        self, folder: Path, size: int, scenario: Scenario, seconds: float = 60.0, timeout: float = 300.0
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.folder = folder
        self.began = time.monotonic()
        port = free_port()
        self.processes = [
            context.Process(target=_run, args=(launch, folder, scenario, seconds, timeout))
            for launch in (Launch("test", rank, size, rank, size, port=port) for rank in range(size))
        ]
        for process in self.processes:
            process.start()

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 has done `step` steps."""
        while not (self.folder / f"step{step}").exists():
            assert self.processes[0].is_alive(), self.errors()
            time.sleep(0.01)

    def end(self, within: float = 60.0) -> list[int | None]:
        """The exit statuses by rank, once all have ended; AssertionError where one has not `within` seconds."""
        until = time.monotonic() + within
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        running = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not running, f"ranks {running} did not end:\n{self.errors()}"
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """What each rank printed."""
        return [(self.folder / f"errors{rank}").read_text() for rank in range(len(self.processes))]

    def signal(self, rank: int, number: int) -> int:
        """Send a signal to one of them; return its pid."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        return pid


def _run(launch: Launch, folder: Path, scenario: Scenario, seconds: float, timeout: float) -> None:
    torch.set_num_threads(1)
    with (folder / f"errors{launch.rank}").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    with joined("cpu", launch=launch) as world:
        if world.group is not None:
            dist.set_timeout(timedelta(seconds=timeout), world.group)
        with watched(world, launch, seconds, orderly=(Agreed,), **QUICK) as monitor:
            scenario(world, monitor, folder)


def wait_for_ever() -> None:
    time.sleep(1000)


def steps(world: World, monitor: Monitor, folder: Path, until: int = 1_000_000) -> None:
    """Steps as of training, of a hundredth of a second."""
    for step in range(1, until + 1):
        dist.all_reduce(torch.ones(3), group=world.group)
        monitor.beat(step)
        if world.first and step <= 3:
            (folder / f"step{step}").touch()
        time.sleep(0.01)
