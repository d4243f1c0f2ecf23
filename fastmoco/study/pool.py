"""The runner's processes: each computes one cell at a time, and one that dies is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from fastmoco.errors import UserError
from fastmoco.study.config import Study
from fastmoco.study.worker import Job, Outcome, Trial, serve

_PATIENCE = 60.0

Serve = Callable[[Connection, Study, str], None]
"""What a process does: see `worker.serve`."""


class Pool:
    """`size` processes that do `serve`, started when they are first needed. Use in a `with` block, which ends them."""

    def __init__(self, study: Study, size: int, device: str, *, serve: Serve = serve) -> None:
        self._study, self._size, self._device, self._serve = study, size, device, serve
        # Fork would copy a runner that holds threads and, where torch was used, a GPU.
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Process] = []
        self._busy: dict[Connection, tuple[_Process, Job]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._end(gently=error is None)

    @property
    def free(self) -> int:
        """Cells that can be started now."""
        return self._size - len(self._busy)

    @property
    def running(self) -> list[str]:
        """Ids of the cells that are being computed."""
        return [job.cell.id for _, job in self._busy.values()]

    def start(self, job: Job) -> None:
        """Have `job` done by a process that is free."""
        process = self._sent(job)
        self._busy[process.connection] = (process, job)

    def wait(self, seconds: float) -> list[Outcome]:
        """What is finished, waiting up to `seconds` for the first."""
        outcomes = []
        for connection in wait(list(self._busy), timeout=seconds) if self._busy else []:
            assert isinstance(connection, Connection)
            process, job = self._busy.pop(connection)
            try:
                outcome = connection.recv()
                outcomes.append(outcome)
                if not outcome.last:
                    self._idle.append(process)
            except (EOFError, ConnectionError):
                outcomes.append(Outcome(cell=job.cell.id, state="failed", reason=process.death()))
        if not self._busy and not outcomes:
            time.sleep(seconds)
        return outcomes

    def trial(self, size: int) -> float:
        """Seconds an image of `size` takes a process, through the network and back.

        Raises UserError where the process ends over it: cells would fare no better.
        """
        process = self._sent(Trial(size))
        try:
            found: float = process.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(f"the study's processes cannot run on {self._device}: {process.death()}") from error
        self._idle.append(process)
        return found

    def _sent(self, task: Job | Trial) -> _Process:
        """A process that was given `task`: an idle one that still lives, or a new one."""
        while self._idle:
            process = self._idle.pop()
            if process.own.is_alive():
                process.connection.send(task)
                return process
        process = self._new()
        process.connection.send(task)
        return process

    def _new(self) -> _Process:
        # What multiplies matrices asks for its threads as it is loaded; with one a core, each process would have them.
        with _environment("OMP_NUM_THREADS", str(self._study.grid.threads)):
            return _Process(self._context, self._serve, (self._study, self._device))

    def _end(self, *, gently: bool) -> None:
        for process in self._idle:
            process.ask_to_end()
        for process, _ in self._busy.values():
            # A pretraining saves what it has; whatever else runs ends at once.
            process.own.terminate()
            process.connection.close()
        everyone = [*self._idle, *(process for process, _ in self._busy.values())]
        for process in everyone:
            process.own.join(timeout=_PATIENCE if gently or process not in self._idle else 1.0)
            if process.own.is_alive():
                process.own.kill()
                process.own.join()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Process:
    def __init__(self, context: Any, serve: Serve, args: tuple[Study, str]) -> None:
        self.connection, theirs = context.Pipe()
        self.own = context.Process(target=serve, args=(theirs, *args), daemon=False)
        self.own.start()
        # So that the end of the process is seen as the end of the pipe.
        theirs.close()

    def death(self) -> str:
        """Why it answers no more."""
        self.own.join(timeout=_PATIENCE)
        code = self.own.exitcode
        if code is not None and code < 0:
            return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"its process ended with status {code}"

    def ask_to_end(self) -> None:
        try:
            self.connection.send(None)
        except (BrokenPipeError, OSError):
            self.own.terminate()
