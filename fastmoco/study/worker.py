"""A process that computes cells, one after the other, as the runner sends them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from fastmoco.device import device_name
from fastmoco.errors import UserError
from fastmoco.study.cell import Cell, digest
from fastmoco.study.config import Study
from fastmoco.study.store import FORMAT, Record, Store, machine, versions
from fastmoco.study.work.encoders import is_whole, run_folder
from fastmoco.study.work.spent import counted
from fastmoco.train.pretrain import Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A cell to compute. `needed` are the cells that it names in `needs`; `again`: also where it is finished.

    `since` is when the runner began (seconds of the epoch): a failure after that, of another runner's, is taken as
    it is.
    """

    cell: Cell
    needed: dict[str, Cell]
    command: str
    again: bool
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a job: `busy`, another process works on it; `found`, another process has finished it; `stopped`,
    it was asked to end. `last`: the process ends over it."""

    cell: str
    state: Literal["done", "found", "busy", "failed", "stopped"]
    seconds: float = 0.0
    reason: str = ""
    last: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """Measure the seconds that an image of `size` pixels a side takes, through the network and back."""

    size: int


def serve(connection: Connection, study: Study, device: str) -> None:
    """Answer each Job with an Outcome and each Trial with a number, until None comes or the runner is gone."""
    # Ctrl-C reaches every process of the terminal; the runner tells each what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    import torch

    from fastmoco.device import find_device

    torch.set_num_threads(study.grid.threads)
    worker = _Worker(study, str(find_device(device)))
    # A runner that ends closes its side.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (task := connection.recv()) is not None:
            answer = worker.trial(task.size) if isinstance(task, Trial) else worker.compute(task)
            connection.send(answer)
            if isinstance(answer, Outcome) and answer.last:
                return


def _end_with_parent() -> None:
    """A cell whose runner was killed must not go on: its lock would be held for a result that nobody waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Worker:
    def __init__(self, study: Study, device: str) -> None:
        self.study, self.device = study, device
        self.store = Store(study.out)
        self._contexts: dict[str, Any] = {}

    def compute(self, job: Job) -> Outcome:
        cell, store = job.cell, self.store
        with store.locked(cell.id) as own:
            if not own:
                return Outcome(cell=cell.id, state="busy")
            if not job.again and is_whole(store, cell):
                return Outcome(cell=cell.id, state="found")
            if (reason := store.failed_since(cell, job.since)) is not None:
                return Outcome(cell=cell.id, state="failed", reason=reason)
            run = run_folder(store, cell) if cell.kind == "pretrain" else None
            if job.again and run is not None and run.exists():
                # Else what is there, whole or half, would be taken for the result.
                shutil.rmtree(run)
            with counted(run) as seconds:
                return self._computed(job, seconds)

    def _computed(self, job: Job, seconds: Callable[[], float]) -> Outcome:
        cell = job.cell
        try:
            with _output_to(self.store.logs / f"{cell.id}.log"):
                result = self._result(job)
        except UserError as error:
            return self._failed(cell, str(error))
        except Stopped as stopped:
            return Outcome(cell=cell.id, state="stopped", reason=str(stopped), last=True)
        except Exception:
            # A GPU that met an error answers nothing more in this process.
            return self._failed(cell, traceback.format_exc(), last=self.device.startswith("cuda"))
        taken = seconds()
        self.store.write(self._record(job, result, taken))
        return Outcome(cell=cell.id, state="done", seconds=taken)

    def _result(self, job: Job) -> dict[str, Any]:
        import torch

        from fastmoco.study.work.compute import WORK
        from fastmoco.study.work.context import Context

        own = job.cell.settings["data"]
        name, data = own["name"], self.study.named(own["name"])
        if name not in self._contexts:
            self._contexts[name] = Context(self.study, data, self.store, self.device, own)
        try:
            return WORK[job.cell.kind](job.cell, self._contexts[name], job.needed)
        finally:
            if torch.cuda.is_initialized():
                # Others share the GPU.
                gc.collect()
                torch.cuda.empty_cache()

    def _record(self, job: Job, result: dict[str, Any], seconds: float) -> Record:
        cell = job.cell
        needed = {need: self.store.finished(other) for need, other in job.needed.items()}
        inputs = {need: record["key"] for need, record in needed.items() if record is not None}
        return {
            "format": FORMAT,
            "id": cell.id,
            "kind": cell.kind,
            "settings": dict(cell.settings),
            "hash": cell.hash,
            "group": cell.group,
            "inputs": inputs,
            "result": result,
            "key": digest(result),
            "seconds": round(seconds, 3),
            "device": device_name(self.device),
            "machine": machine(),
            "versions": versions(),
            "command": job.command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _failed(self, cell: Cell, reason: str, *, last: bool = False) -> Outcome:
        self.store.write_failure(cell, reason)
        return Outcome(cell=cell.id, state="failed", reason=reason.rstrip(), last=last)

    def trial(self, size: int) -> float:
        import torch

        from fastmoco.models.encoder import Encoder

        model = Encoder(self.study.grid.arch, seed=0).to(self.device).to(memory_format=torch.channels_last)
        batch = torch.zeros(32, 3, size, size, device=self.device).contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            # To the host and back, so that what was launched is also done.
            model(batch).embedding.square().mean().backward()
            float(next(model.parameters()).grad.sum())  # type: ignore[union-attr]
            times.append(time.perf_counter() - start)
        return min(times[1:]) / len(batch)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what is printed, by libraries in C too, to the end of `path` for a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for own, where in zip(kept, (1, 2), strict=True):
            os.dup2(own, where)
            os.close(own)
