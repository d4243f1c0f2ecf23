"""The folder of a study: finished cells as one JSON file each, their locks, failures and logs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import fastmoco
from fastmoco.atomic import write_text
from fastmoco.errors import UserError
from fastmoco.study.cell import Cell, digest

FORMAT = 2
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn")
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Record = dict[str, Any]
"""A finished cell: "id", "kind", "settings", "hash", "inputs" (the needed cells' keys), "result", "key" (SHA-256 of the
result), "seconds", "device", "machine", "versions", "command", "finished" (UTC) and "checksum" over all these."""


class Store:
    """The folder `out`. Every file in it is written whole or not at all."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.cells = out / "cells"
        self.failures = out / "failures"
        self.locks = out / "locks"
        self.logs = out / "logs"
        self.runs = out / "runs"
        self.data = out / "data"

    def make(self) -> None:
        """Make the folders. Raises UserError where they cannot be made."""
        try:
            for folder in (self.cells, self.failures, self.locks, self.logs, self.runs, self.data):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"[study] out: {self.out}: cannot be written: {error.strerror or error}") from error

    def path(self, cell_id: str) -> Path:
        """The file of a finished cell."""
        return self.cells / f"{cell_id}.json"

    def read(self, cell_id: str) -> Record | None:
        """The record of a cell that is finished, whatever its settings; None where there is none.

        Raises Damaged where its file is not what was written.
        """
        path = self.path(cell_id)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise Damaged(path, str(error)) from error
        try:
            record = json.loads(text)
        except ValueError as error:
            raise Damaged(path, f"not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("id") != cell_id:
            raise Damaged(path, "not the record of this cell")
        if record.pop("checksum", None) != digest(record):
            raise Damaged(path, "its checksum does not fit what it holds")
        return record

    def finished(self, cell: Cell) -> Record | None:
        """The record of `cell` with the settings that it has now; None where that is still to be computed."""
        try:
            record = self.read(cell.id)
        except Damaged:
            return None
        return record if record is not None and record["hash"] == cell.hash else None

    def write(self, record: Record) -> None:
        """Keep `record`, and forget that the cell failed before."""
        full = record | {"checksum": digest(record)}
        write_text(self.path(record["id"]), json.dumps(full, separators=(",", ":"), allow_nan=False) + "\n")
        self.failure_path(record["id"]).unlink(missing_ok=True)

    def failure_path(self, cell_id: str) -> Path:
        """Where the reason stands that a cell failed for."""
        return self.failures / f"{cell_id}.txt"

    def write_failure(self, cell: Cell, reason: str) -> None:
        """Keep why `cell` failed, below the hash of its settings."""
        write_text(self.failure_path(cell.id), f"{cell.hash}\n{reason.rstrip()}\n")

    def failure(self, cell: Cell) -> str | None:
        """Why `cell` failed with the settings that it has now, or None."""
        try:
            text = self.failure_path(cell.id).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        settings, _, reason = text.partition("\n")
        return reason.rstrip() if settings == cell.hash else None

    def failed_since(self, cell: Cell, moment: float) -> str | None:
        """Why `cell` failed, if that was after `moment` (seconds of the epoch)."""
        try:
            late = self.failure_path(cell.id).stat().st_mtime > moment
        except FileNotFoundError:
            return None
        return self.failure(cell) if late else None

    @contextlib.contextmanager
    def locked(self, cell_id: str) -> Iterator[bool]:
        """Whether the cell is this process's alone, for as long as the block lasts; never waits.

        The kernel lets go of the lock when its owner ends, however it ends: none of a dead process is left to be
        broken. Its file stays, with who held it last. Raises UserError where the file system has no locks.
        """
        with (self.locks / f"{cell_id}.lock").open("a+") as stream:
            own = self._lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if own:
                _replace(stream, f"{platform.node()} {os.getpid()}\n")
            yield own

    @contextlib.contextmanager
    def shared(self, settings: str) -> Iterator[None]:
        """Be one of the runners that are at work here, for as long as the block lasts: all on the same `settings`.

        Raises UserError where others have other ones: each would overwrite what the other computes.
        """
        with (self.locks / "runners.lock").open("a+") as stream:
            if self._lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _replace(stream, settings)
            # Waits while another writes its own. From one lock to the other there is a gap: what stands there counts.
            self._lock(stream, fcntl.LOCK_SH)
            stream.seek(0)
            if stream.read() != settings:
                raise UserError(
                    f"[study] out: in {self.out} a study is being computed with other settings or of other images; "
                    "wait for its end, or give this one a folder of its own"
                )
            yield

    def _lock(self, stream: IO[str], how: int) -> bool:
        try:
            fcntl.flock(stream, how)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise UserError(
                    f"[study] out: {self.out} lies on a file system without locks, where two processes could work "
                    "on one cell: choose another, or mount it with locks (Lustre: -o flock)"
                ) from error
            raise
        return True


def _replace(stream: IO[str], text: str) -> None:
    stream.truncate(0)
    stream.write(text)
    stream.flush()


class Damaged(Exception):
    """A cell's file that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


@cache
def versions() -> dict[str, str]:
    """The versions that a result was computed with; "source" tells apart states of the program of one version."""
    found = {"fastmoco": fastmoco.__version__, "source": _source(), "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _source() -> str:
    """The first digits of the SHA-256 of the package's modules, their names included."""
    root = Path(fastmoco.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


@cache
def machine() -> str:
    """Processor and number of cores, in words; no name of the machine's own."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"
