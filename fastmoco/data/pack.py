"""Pack images into tar shards in WebDataset's layout, so that a network file system sees few large files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastmoco.atomic import replacing
from fastmoco.data.lock import alone
from fastmoco.data.manifest import Manifest
from fastmoco.data.manifest_file import RESERVED, SHARD_INDEX, write_manifest
from fastmoco.data.members import SOURCE, Member, read_members, record
from fastmoco.data.sizes import show_bytes, show_count
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError
from fastmoco.tracking import Lines

# Bytes that a member takes beside its data, about: two headers, the record of labels, padding.
_OVERHEAD = 4 * tarfile.BLOCKSIZE
_LATEST = 8**11 - 1
# Images read ahead, no more than so many and, but for one, so many bytes.
_READ_AHEAD = 256
_AHEAD_BYTES = 64 << 20
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """What goes into one shard: images `indices` of the manifest, under keys that count from `first`."""

    number: int
    first: int
    indices: Sequence[int]

    @property
    def name(self) -> str:
        """Its file."""
        return f"shard-{self.number:06d}.tar"


def plan(manifest: Manifest, shard_bytes: int, seed: int | None) -> list[Shard]:
    """Which image goes where: in the order of the manifest, or in one that `seed` decides, about `shard_bytes` each.

    Where an image comes depends on those before it only, so that one that is gone does not undo finished shards.
    Raises UserError where the images are not encoded files, or a label has a name that the index or a record needs.
    """
    if manifest.stamps is None or manifest.root.suffix.lower() == ".npz":
        raise UserError(f"{manifest.root}: its images are not files of their own, so there is nothing to pack")
    # Said now, and not when the index is written at the end.
    reserved = (RESERVED | {SOURCE}) & set(manifest.labels)
    if reserved:
        raise UserError(f"--label {min(reserved)}: packed images have a field of that name; give the label another")
    order = list(range(len(manifest)))
    if seed is not None:
        order.sort(key=lambda i: hashlib.sha256(os.fsencode(f"{seed}/{manifest.files[i]}")).digest())
    shards: list[Shard] = []
    taken: list[int] = []
    size = 0
    for place, i in enumerate(order):
        taken.append(i)
        size += int(manifest.stamps[i, 0]) + _OVERHEAD
        if size >= shard_bytes or place == len(order) - 1:
            shards.append(Shard(len(shards), place + 1 - len(taken), taken))
            taken, size = [], 0
    return shards


def pack(
    manifest: Manifest, out: Path, *, shard_bytes: int, seed: int | None = None, workers: int = 0, progress: bool = True
) -> Manifest:
    """Write the images of `manifest` to shards in `out`, then `out`/index.csv; return the manifest of the members.

    Each shard holds, for each image, KEY.SUFFIX with the file's bytes and KEY.json with its labels, patient and split,
    the file it was and the SHA-256 of its bytes. A shard is written under another name, flushed, read back and compared
    before it gets its own; a shard that is there already is kept, if it holds what it should. Of several processes that
    pack into one folder one works and the others wait for it.

    Raises UserError for an image that cannot be read, a folder that cannot be written or is too small, and a finished
    shard that holds something else. Then, as after a kill, the same call goes on where this one ended.
    """
    shards = plan(manifest, shard_bytes, seed)
    members: list[list[Member]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_others(out)
        with alone(out, "packing into", required=False):
            for finished in _write_all(manifest, shards, out, workers=workers, progress=progress):
                members.append(finished)
            packed = _index(manifest, shards, members, out)
            write_manifest(out / SHARD_INDEX, packed)
    except BadFile as bad:
        raise UserError(
            f"{bad}. {len(members)} of {show_count(len(shards), 'shard')} finished in {out}; restore the file or "
            "take it out of the set, and run the same command again"
        ) from bad
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"--out {out}: {'the disk is full' if full else f'cannot be written: {error.strerror or error}'}. "
            f"{len(members)} of {show_count(len(shards), 'shard')} finished; run the same command again to go on"
        ) from error
    return packed


def _write_all(
    manifest: Manifest, shards: list[Shard], out: Path, *, workers: int, progress: bool
) -> Iterator[list[Member]]:
    """Write the shards that are not there yet; yields the members of each shard as it is finished."""
    _clear(out, shards)
    waiting = [shard for shard in shards if not (out / shard.name).exists()]
    assert manifest.stamps is not None
    needed = sum(int(manifest.stamps[shard.indices, 0].sum()) + _OVERHEAD * len(shard.indices) for shard in waiting)
    _need_room(out, needed)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(4 * (workers or os.cpu_count() or 1)) as pool,
    ):
        task = bar.add_task("packing", total=needed)
        lines = Lines(bar.console, len(shards))
        for number, shard in enumerate(shards, start=1):
            if not (out / shard.name).exists():
                _write(manifest, shard, out, pool, lambda size: bar.advance(task, size + _OVERHEAD))
            yield _finished(manifest, shard, out)
            if progress:
                lines.say(f"packing: {number:,} of {len(shards):,} shards, ETA {lines.left(number)}")


def _refuse_others(out: Path) -> None:
    """Refuse a folder that holds something else: hidden files apart, and what packing leaves."""
    held = sorted(path.name for path in out.iterdir() if not path.name.startswith(".") and path.name != SHARD_INDEX)
    if held and not any(name.startswith("shard-") for name in held):
        raise UserError(f"--out {out}: holds {held[0]}, and no shards; name a folder of their own")


def _clear(out: Path, shards: list[Shard]) -> None:
    """Remove what a killed process left half-written; refuse shards that are not of this plan."""
    for half in out.glob(".shard-*.tar.tmp-*"):
        half.unlink()
    extra = sorted({path.name for path in out.glob("shard-*.tar")} - {shard.name for shard in shards})
    if extra:
        raise UserError(
            f"--out {out}: {extra[0]} is there, but the images make only {show_count(len(shards), 'shard')}; name "
            "another folder"
        )


def _need_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed and needed + _SPARE_BYTES > free:
        raise UserError(
            f"--out {out}: about {show_bytes(needed)} are to be written, and {show_bytes(free)} are free; "
            "make room or name a folder on a larger disk"
        )


def _write(
    manifest: Manifest, shard: Shard, out: Path, pool: ThreadPoolExecutor, advance: Callable[[int], object]
) -> None:
    """Write one shard, telling `advance` each image's bytes. Raises BadFile and OSError, and leaves nothing then."""
    digests: dict[str, str] = {}
    with replacing(out / shard.name) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, (i, data) in enumerate(_read(manifest, shard.indices, pool)):
                key, suffix = f"{shard.first + place:09d}", os.path.splitext(manifest.files[i])[1].lower()
                source = {"file": _text(manifest.files[i]), "sha256": hashlib.sha256(data).hexdigest()}
                beside = json.dumps({**record(manifest, i), SOURCE: source}, sort_keys=True).encode()
                for name, content in ((f"{key}{suffix or '.bin'}", data), (f"{key}.json", beside)):
                    _add(tar, name, content, mtime_ns=int(manifest.stamps[i, 1]))  # type: ignore[index]
                    digests[name] = hashlib.sha256(content).hexdigest()
                advance(len(data))
        _compare(temporary, digests)


def _read(manifest: Manifest, indices: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[tuple[int, bytes]]:
    """The bytes of each image in turn, read some way ahead. Raises BadFile."""
    assert manifest.stamps is not None
    sizes = manifest.stamps[:, 0].tolist()
    waiting: deque[tuple[int, Future[Any]]] = deque()
    held = 0
    for i in map(int, indices):
        while waiting and (len(waiting) == _READ_AHEAD or held + sizes[i] > _AHEAD_BYTES):
            first, job = waiting.popleft()
            yield first, job.result()
            held -= sizes[first]
        waiting.append((i, pool.submit(manifest.read, i)))
        held += sizes[i]
    while waiting:
        first, job = waiting.popleft()
        yield first, job.result()


def _text(name: str) -> str:
    """A file's name, which may hold any bytes, as text."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _add(tar: tarfile.TarFile, name: str, content: bytes, *, mtime_ns: int) -> None:
    # Owner and mode are left at their defaults: the same images make the same shard whoever packs them.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    # The header has room for 1970 to 2242.
    info.mtime = min(max(mtime_ns // 10**9, 0), _LATEST)
    tar.addfile(info, io.BytesIO(content))


def _compare(path: Path, digests: dict[str, str]) -> None:
    """Read the shard back from the disk. Raises OSError where a member is not what was to be written."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        # From the disk, not from memory.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = {}
        with tarfile.open(fileobj=stream) as tar:
            for info in tar:
                content = tar.extractfile(info)
                assert content is not None
                found[info.name] = hashlib.sha256(content.read()).hexdigest()
    if found != digests:
        raise OSError(errno.EIO, f"{path.name} reads back other than it was written")


def _finished(manifest: Manifest, shard: Shard, out: Path) -> list[Member]:
    """The members of a finished shard. Raises UserError where they are not those of the plan."""
    members = read_members(out / shard.name)
    stamps = manifest.stamps
    assert stamps is not None
    wanted = [(int(stamps[i, 0]), _text(manifest.files[i]), record(manifest, i)) for i in shard.indices]
    there = [(m.size, m.record[SOURCE]["file"], {k: v for k, v in m.record.items() if k != SOURCE}) for m in members]
    if there != wanted:
        place = next((n for n, (a, b) in enumerate(zip(there, wanted, strict=False)) if a != b), len(there))
        file = manifest.files[shard.indices[min(place, len(shard.indices) - 1)]]
        raise UserError(
            f"{out / shard.name} holds other images than it would now (first seen at {file}): the images, their "
            "labels, --shard-size or --seed have changed since it was written. Pack into another folder, or delete the "
            "shards from this one on"
        )
    return members


def _index(manifest: Manifest, shards: list[Shard], members: list[list[Member]], out: Path) -> Manifest:
    """The manifest of the packed images. Without the shards' times, so that it holds for copies of the folder too."""
    chosen = np.concatenate([shard.indices for shard in shards]).astype(np.int64)
    flat = [(shard.name, member) for shard, found in zip(shards, members, strict=True) for member in found]
    selected = manifest.select(chosen)
    return replace(
        selected,
        root=out,
        files=[f"{name}/{member.name}" for name, member in flat],
        stamps=np.array([(member.size, 0) for _, member in flat], dtype=np.int64),
        offsets=np.array([member.offset for _, member in flat], dtype=np.int64),
        skipped=[],
    )
