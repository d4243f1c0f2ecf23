"""The images of a packed shard and the record beside each, read back; and whether they are what was packed."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.data.manifest import Manifest
from fastmoco.data.store import split_member
from fastmoco.data.tars import read_headers
from fastmoco.errors import UserError
from fastmoco.tracking import track

# In an image's record, where it came from: an object, which what reads shards does not take for a label.
SOURCE = "packed_from"


@dataclass(frozen=True)
class Member:
    """An image in a shard: its `name`, the `offset` of its bytes, their number, and the record that lies beside it."""

    name: str
    offset: int
    size: int
    record: dict[str, Any]


def read_members(shard: Path) -> list[Member]:
    """The images of a shard that `pack` wrote, in order; of the images only the headers are read.

    Raises UserError where it is not such a shard, or is damaged.
    """
    members: list[Member] = []
    try:
        with shard.open("rb") as stream:
            headers = read_headers(shard)
            for image in headers:
                beside = next(headers, image)
                record = json.loads(os.pread(stream.fileno(), beside.size, beside.offset_data))
                stem = os.path.splitext(image.name)[0]
                if beside.name != f"{stem}.json" or not isinstance(record[SOURCE]["sha256"], str):
                    raise ValueError(f"no record beside {image.name}")
                members.append(Member(image.name, image.offset_data, image.size, record))
    except (tarfile.TarError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{shard}: is not a shard that was packed here, or is damaged ({error}); delete it, and packing writes it "
            "again"
        ) from error
    return members


def compare(packed: Manifest, *, workers: int = 0, progress: bool = True) -> list[str]:
    """What is wrong with the shards of a folder whose index is `packed`, one line each; none where all is well.

    Every image's bytes are read and their SHA-256 compared with the record beside it, and the record and the place in
    the shard with the index.
    """
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(packed.files):
        rows.setdefault(split_member(name)[0], []).append(i)
    unlisted = sorted({path.name for path in packed.root.glob("*.tar")} - rows.keys())
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        found = pool.map(lambda shard: _compare_shard(packed, shard, rows[shard]), rows)
        each = list(track(found, "checking shards", total=len(rows), progress=progress))
    return [f"{name}: not in the index" for name in unlisted] + [line for lines in each for line in lines]


def _compare_shard(packed: Manifest, shard: str, rows: list[int]) -> list[str]:
    try:
        members = read_members(packed.root / shard)
    except UserError as error:
        return [str(error)]
    except FileNotFoundError:
        return [f"{shard}: no such shard"]
    except OSError as error:
        return [f"{shard}: cannot be read: {error.strerror or error}"]
    wrong = []
    assert packed.stamps is not None and packed.offsets is not None
    indexed = [(packed.files[i], int(packed.offsets[i]), int(packed.stamps[i, 0]), record(packed, i)) for i in rows]
    said = indexed[0][3].keys()
    there = [(f"{shard}/{m.name}", m.offset, m.size, {k: m.record.get(k) for k in said}) for m in members]
    if there != indexed:
        wrong.append(f"{shard}: holds other images, or other labels of them, than the index says")
    with (packed.root / shard).open("rb") as stream:
        for member in members:
            data = os.pread(stream.fileno(), member.size, member.offset)
            if hashlib.sha256(data).hexdigest() != member.record[SOURCE]["sha256"]:
                file = member.record[SOURCE]["file"]
                wrong.append(f"{shard}/{member.name}: damaged, its bytes are not those that {file} had")
    return wrong


def record(manifest: Manifest, i: int) -> dict[str, Any]:
    """What is known of image `i`: its labels by their classes' names, its patient and its split."""
    said: dict[str, Any] = {name: manifest.class_names[name][values[i]] for name, values in manifest.labels.items()}
    for name, column in (("patient", manifest.patients), ("split", manifest.splits)):
        if column is not None:
            said[name] = str(column[i])
    return said
