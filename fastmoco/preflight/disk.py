"""How fast a folder is written to, read from and brought to the disk, and whether all nodes see the same one."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastmoco.distributed.agreement import texts
from fastmoco.distributed.world import World

BLOCK = 4 * 2**20
# A network file system may keep for some seconds what it knows about a folder.
PATIENCE = 15.0


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second written (on the disk at the end) and read, and seconds that a small file takes to be on the disk;
    or why there are none, in `problem`."""

    write: float = 0.0
    read: float = 0.0
    sync: float = 0.0
    problem: str = ""


def measure_disk(folder: Path, size: int) -> DiskSpeed:
    """The speed of `folder` with a file of `size` bytes, which is removed again."""
    path = folder / f".fastmoco-doctor-{secrets.token_hex(8)}"
    # Random, since some file systems compress; the same block again and again would do only for those that do not.
    blocks = [secrets.token_bytes(BLOCK) for _ in range(max(1, size // BLOCK))]
    try:
        try:
            write = _timed_write(path, blocks)
            read = _timed_read(path)
            sync = min(_timed_write(path, [b"x"]) for _ in range(5))
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return DiskSpeed(problem=f"{folder}: {error.strerror or error}")
    total = sum(map(len, blocks))
    return DiskSpeed(total / write, total / read, sync)


def _timed_write(path: Path, blocks: list[bytes]) -> float:
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for block in blocks:
            stream.write(block)
        os.fsync(stream.fileno())
    return time.perf_counter() - start


def _timed_read(path: Path) -> float:
    with path.open("rb", buffering=0) as stream:
        # What this machine still has in its memory is to be read from the disk again.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while stream.read(BLOCK):
            pass
        return time.perf_counter() - start


def unseen(world: World, folder: Path, *, speaks: bool, patience: float = PATIENCE) -> list[int]:
    """The ranks whose file in `folder` this process does not see; `speaks` where this process writes one.

    To be called by all processes at once; all files are removed again.
    """
    name = f".fastmoco-doctor-{secrets.token_hex(8)}" if speaks else ""
    try:
        if name:
            (folder / name).write_text(name)
    except OSError:
        # The disk's measurement says why; here nobody sees the file.
        pass
    names = texts(world, name)
    wanted = {rank: folder / other for rank, other in enumerate(names) if other}
    until = time.monotonic() + patience
    while (missing := [rank for rank, path in wanted.items() if not _listed(path)]) and time.monotonic() < until:
        time.sleep(0.1)
    # All have looked before any file goes.
    texts(world, "")
    if name:
        # Where nothing could be written, nothing may be removable either, even if it is not there.
        with suppress(OSError):
            (folder / name).unlink()
    return missing


def _listed(path: Path) -> bool:
    try:
        # A look-up by name alone may be answered from what was known before.
        return path.name in os.listdir(path.parent) and path.read_text() == path.name
    except OSError:
        return False
