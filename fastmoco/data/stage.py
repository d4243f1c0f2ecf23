"""Copy a data set to a disk of this machine before training, once for all its processes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastmoco.data.lock import alone
from fastmoco.data.manifest import Manifest
from fastmoco.data.sizes import show_bytes
from fastmoco.data.store import split_member
from fastmoco.errors import UserError

# Of the disk, for what else is written to it.
_SPARE_BYTES = 64 << 20
# Files in flight: a network file system answers slowly and many at once.
_THREADS = 16
_LOT = 256

Stamp = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")


def stage(manifest: Manifest, folder: Path, *, progress: bool = True) -> Manifest:
    """Copy what `manifest` lists (files, shards or the .npz) below `folder`; return the manifest of the copies.

    Modification times are kept, as far as the disk can; the manifest has those of the copies. What is there already, of
    the same size and time, is not copied again, so that the next run, or one that was interrupted, copies the rest. Of
    several processes of this machine one copies and the others wait for it. What cannot be read is left out, and met by
    training where it would be met without staging.

    Raises UserError where the folder cannot be written, has too little room, or a file lies outside the data folder.
    """
    root = manifest.root
    # Two data sets may share names, and a set may lie under its name in two places.
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    target = folder / f"{root.name or 'data'}-{place}"
    single = root.suffix.lower() == ".npz"
    source = root.parent if single else root
    names, stamps = _files(manifest, single=single)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with alone(target, "copying the images to"):
            times = _copy_missing(source, target, names, stamps, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--stage {folder}: the disk is full; what was copied is kept for the next try") from error
        raise UserError(f"--stage {folder}: cannot be written: {error.strerror or error}") from error
    copies = replace(manifest, root=target / root.name if single else target)
    if times.held and manifest.stamps is not None:
        copies.stamps = times.of_copies(_file_of_each(manifest, single=single), manifest.stamps)
    return copies


def _file_of_each(manifest: Manifest, *, single: bool) -> Iterator[str]:
    """The file that holds each image, relative to the data folder."""
    for name in manifest.files:
        if single:
            yield manifest.root.name
        else:
            yield name if manifest.offsets is None else split_member(name)[0]


def _files(manifest: Manifest, *, single: bool) -> tuple[list[str], list[Stamp | None]]:
    """The files that hold the images, relative to the data folder, and each one's (bytes, mtime_ns) where recorded."""
    if single or manifest.offsets is not None or manifest.stamps is None:
        names = list(dict.fromkeys(_file_of_each(manifest, single=single)))
        return _inside(names), [None] * len(names)
    return _inside(manifest.files), [(int(size), int(mtime)) for size, mtime in manifest.stamps]


def _inside(names: list[str]) -> list[str]:
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep, 1)[0] == "..":
            raise UserError(f"--stage: {name} lies outside the data folder; staging copies only what is below it")
    return names


class _Times:
    """The times of copies on a disk that keeps coarser ones than the originals have (exFAT, some network disks).

    `held` maps a file's name to (its original's time, its copy's), in ns, where these differ. Safe to use from several
    threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.held: dict[str, tuple[int, int]] = {}

    def same(self, name: str, original: int, copy: int) -> bool:
        """Whether a copy of time `copy` is what this disk makes of `original`."""
        if original == copy:
            return True
        probe = self._folder / f"time-{threading.get_ident()}"
        probe.open("ab").close()
        os.utime(probe, ns=(original, original))
        if probe.stat().st_mtime_ns != copy:
            return False
        self.held[name] = original, copy
        return True

    def of_copies(self, names: Iterable[str], stamps: np.ndarray) -> np.ndarray:
        """`stamps` (n, 2) of the originals, with the times of the copies where they have others; of files `names`."""
        stamps = stamps.copy()
        for i, name in enumerate(names):
            original, copy = self.held.get(name, (0, 0))
            # A file that had another time than is recorded stays one that has changed.
            if original and stamps[i, 1] == original:
                stamps[i, 1] = copy
        return stamps


def _copy_missing(
    source: Path, target: Path, names: Sequence[str], stamps: Sequence[Stamp | None], *, progress: bool
) -> _Times:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    halves = target / ".halves"
    # Of a process that was killed.
    shutil.rmtree(halves, ignore_errors=True)
    halves.mkdir()
    times = _Times(halves)
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        pairs = list(zip(names, stamps, strict=True))
        wanted = _each(pool, lambda pair: _wanted(source, target, *pair, times), pairs)
        missing = [(name, size) for name, size in zip(names, wanted, strict=True) if size is not None]
        needed = sum(size for _, size in missing)
        free = shutil.disk_usage(target).free
        if missing and needed + _SPARE_BYTES > free:
            raise UserError(
                f"--stage {target.parent}: {show_bytes(needed)} are to be copied, and {show_bytes(free)} are free; "
                "name a folder on a larger disk, or train without --stage"
            )
        for folder in {(target / name).parent for name, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        task = bar.add_task("copying images", total=needed)

        def copy(numbered: tuple[int, tuple[str, int]]) -> str | None:
            number, (name, size) = numbered
            reason = _copy(source, target, name, halves / str(number), times)
            bar.advance(task, size)
            return reason and f"{source / name}: {reason}"

        unread = [reason for reason in _each(pool, copy, list(enumerate(missing))) if reason is not None]
    shutil.rmtree(halves)
    if unread:
        print(f"warning: {len(unread)} files could not be copied, the first {unread[0]}")
    return times


def _each(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each of `items`, in lots: handing over each by itself takes longer than looking at a file."""
    lot = max(1, min(_LOT, len(items) // (4 * _THREADS)))
    for done in pool.map(
        lambda first: [work(item) for item in items[first : first + lot]], range(0, len(items), lot)
    ):
        yield from done


def _wanted(source: Path, target: Path, name: str, stamp: Stamp | None, times: _Times) -> int | None:
    """Bytes to copy, or None where the copy is as recorded (or, where nothing is recorded, as the original is now)."""
    try:
        found = (source / name).stat() if stamp is None or not stamp[1] else None
    except OSError:
        # Copying will say what is wrong with it.
        return 0
    expected = (found.st_size, found.st_mtime_ns) if found is not None else stamp
    assert expected is not None
    try:
        there = (target / name).stat()
    except FileNotFoundError:
        return expected[0]
    size, time = expected
    return None if there.st_size == size and times.same(name, time, there.st_mtime_ns) else size


def _copy(source: Path, target: Path, name: str, half: Path, times: _Times) -> str | None:
    """Copy a file with its times, whole or not at all; returns why the original could not be read, or None."""
    try:
        with (source / name).open("rb") as stream:
            stamp = os.fstat(stream.fileno())
            with half.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
    except OSError as error:
        half.unlink(missing_ok=True)
        # A read error carries the original's name only where opening failed; a full disk is told by its number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        (target / name).unlink(missing_ok=True)
        return error.strerror or str(error)
    os.utime(half, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    times.same(name, stamp.st_mtime_ns, half.stat().st_mtime_ns)
    os.replace(half, target / name)
    return None
