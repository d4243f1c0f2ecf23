"""Runs of one process or of several, as torchrun starts them, that tests kill, stop and starve."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from worlds import free_port


class Job:
    """`fastmoco` with `args`, as `size` processes of this machine; what each prints is in `folder`.

    cache: the processes' cache folder, by default one in `folder`. prepare: called in each process with its rank,
    before it begins. For a `with` block, at whose end all are killed.
    """

    def __init__(
        self, folder: Path, size: int, args: list[str], *, cache: Path | None = None,
        prepare: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.size = size
        self.outputs = [folder / f"output{rank}" for rank in range(size)]
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        self.processes = [
            context.Process(
                target=_run,
                args=(rank, _environ(cache or folder / "cache", rank, size, port), args, self.outputs[rank], prepare),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self, rank: int) -> str:
        """What a rank printed."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def pid(self, rank: int) -> int:
        """Its process's number."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def wait_until(self, condition: Callable[[], bool], *, within: float = 300.0) -> None:
        """Until `condition` holds; AssertionError where a process ends before, or it takes longer."""
        until = time.monotonic() + within
        while not condition():
            assert time.monotonic() < until, f"not within {within} s:\n{self.all_output()}"
            assert all(process.is_alive() for process in self.processes), f"ended before:\n{self.all_output()}"
            time.sleep(0.002)

    def kill(self, rank: int) -> float:
        """Kill -9 a rank; return the time."""
        os.kill(self.pid(rank), signal.SIGKILL)
        return time.monotonic()

    def end(self, *, within: float = 300.0) -> list[int | None]:
        """The exit statuses by rank, once all have ended; AssertionError where it takes longer."""
        until = time.monotonic() + within
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        assert not any(process.is_alive() for process in self.processes), f"not ended:\n{self.all_output()}"
        return [process.exitcode for process in self.processes]

    def all_output(self) -> str:
        """What all printed, for a message."""
        return "\n".join(f"rank {rank}:\n{self.output(rank)}" for rank in range(self.size))


def _environ(cache: Path, rank: int, size: int, port: int) -> dict[str, str]:
    """What a process is told by its environment; where it is the only one, nothing of others."""
    found = {"XDG_CACHE_HOME": str(cache)}
    if size > 1:
        found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return found


def _run(
    rank: int, environ: Mapping[str, str], args: list[str], output: Path, prepare: Callable[[int], None] | None
) -> None:
    os.environ.update(environ)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    from fastmoco.cli import main

    sys.argv = ["fastmoco", *args]
    sys.exit(main())
