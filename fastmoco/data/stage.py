"""Copy a data set to a disk of this machine before training, once for all its processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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

    Modification times are kept. What is there already, of the same size and time, is not copied again, so that the
    next run, or one that was interrupted, copies the rest. Of several processes of this machine one copies and the
    others wait for it. What cannot be read is left out, and met by training where it would be met without staging.

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
        with _alone(target):
            _copy_missing(source, target, names, stamps, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--stage {folder}: the disk is full; what was copied is kept for the next try") from error
        raise UserError(f"--stage {folder}: cannot be written: {error.strerror or error}") from error
    return replace(manifest, root=target / root.name if single else target)


def _files(manifest: Manifest, *, single: bool) -> tuple[list[str], list[Stamp | None]]:
    """The files that hold the images, relative to the data folder, and each one's (bytes, mtime_ns) where recorded."""
    if single:
        return [manifest.root.name], [None]
    if manifest.offsets is not None:
        shards = list(dict.fromkeys(split_member(name)[0] for name in manifest.files))
        return _inside(shards), [None] * len(shards)
    if manifest.stamps is None:
        return _inside(manifest.files), [None] * len(manifest)
    return _inside(manifest.files), [(int(size), int(mtime)) for size, mtime in manifest.stamps]


def _inside(names: list[str]) -> list[str]:
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise UserError(f"--stage: {name} lies outside the data folder; staging copies only what is below it")
    return names


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the folder's lock, waiting for another process that holds it.

    The kernel lets go of it when its owner ends, however it ends: no lock of a dead process is left to be broken.
    """
    with (target / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which is copying the images to {target}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy_missing(
    source: Path, target: Path, names: Sequence[str], stamps: Sequence[Stamp | None], *, progress: bool
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    halves = target / ".halves"
    # Of a process that was killed.
    shutil.rmtree(halves, ignore_errors=True)
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        pairs = list(zip(names, stamps, strict=True))
        wanted = _each(pool, lambda pair: _wanted(source / pair[0], target / pair[0], pair[1]), pairs)
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
        halves.mkdir()
        task = bar.add_task("copying images", total=needed)

        def copy(numbered: tuple[int, tuple[str, int]]) -> str | None:
            number, (name, size) = numbered
            reason = _copy(source / name, target / name, halves / str(number))
            bar.advance(task, size)
            return reason and f"{source / name}: {reason}"

        unread = [reason for reason in _each(pool, copy, list(enumerate(missing))) if reason is not None]
    shutil.rmtree(halves)
    if unread:
        print(f"warning: {len(unread)} files could not be copied, the first {unread[0]}")


def _each(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each of `items`, in lots: handing over each by itself takes longer than looking at a file."""
    lot = max(1, min(_LOT, len(items) // (4 * _THREADS)))
    for done in pool.map(
        lambda first: [work(item) for item in items[first : first + lot]], range(0, len(items), lot)
    ):
        yield from done


def _wanted(original: Path, copy: Path, stamp: Stamp | None) -> int | None:
    """Bytes to copy, or None where `copy` is as recorded (or, where nothing is recorded, as `original` is now)."""
    try:
        found = original.stat() if stamp is None or not stamp[1] else None
    except OSError:
        # Copying will say what is wrong with it.
        return 0
    expected = (found.st_size, found.st_mtime_ns) if found is not None else stamp
    assert expected is not None
    try:
        there = copy.stat()
    except FileNotFoundError:
        return expected[0]
    return None if (there.st_size, there.st_mtime_ns) == expected else expected[0]


def _copy(original: Path, copy: Path, half: Path) -> str | None:
    """Copy a file with its times, whole or not at all; returns why the original could not be read, or None."""
    try:
        with original.open("rb") as stream:
            stamp = os.fstat(stream.fileno())
            with half.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
    except OSError as error:
        half.unlink(missing_ok=True)
        # A read error carries the original's name only where opening failed; a full disk is told by its number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        copy.unlink(missing_ok=True)
        return error.strerror or str(error)
    os.utime(half, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.replace(half, copy)
    return None
