"""Images in tar shards as WebDataset lays them out: found by reading the headers alone."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.atomic import write_text
from fastmoco.data.cache import cache_file
from fastmoco.data.decode import IMAGE_SUFFIXES
from fastmoco.data.listing import Listing, said_by_folders
from fastmoco.data.manifest_file import require_columns
from fastmoco.data.sizes import show_count
from fastmoco.data.store import split_member
from fastmoco.data.tars import Damaged, read_headers
from fastmoco.errors import UserError
from fastmoco.tracking import track

CLS_LABEL = "cls"
# Bytes in a member that holds labels; a rotten header may claim any number.
_MOST_WORDS = 1 << 20
# One image of a shard: its member's name, the offset of its bytes, their number, and what is said of it.
Row = tuple[str, int, int, dict[str, str]]


def find_shards(data: Path) -> list[Path]:
    """The shards that `data` stands for: itself, or the .tar files of a folder that holds no images beside them.

    Raises UserError where the folder may not be read.
    """
    if data.suffix.lower() == ".tar" and data.is_file():
        return [data]
    if not data.is_dir():
        return []
    try:
        entries = sorted(entry for entry in data.iterdir() if not entry.name.startswith("."))
        if any(entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
            return []
    except OSError as error:
        raise UserError(f"--data {data}: cannot be listed: {error.strerror or error}") from error
    return [entry for entry in entries if entry.suffix.lower() == ".tar"]


def list_shards(shards: Sequence[Path], *, patient_column: str, split_column: str, progress: bool = True) -> Listing:
    """The images in `shards`, which lie in one folder; names are "shard.tar/dir/key.jpg".

    Members that share a key (the name up to the first dot of its last part) belong together: of an image, `key.cls`
    holds its label "cls", and `key.json` an object whose members are labels, but for its patient and split. Where
    neither is there, folders inside the shards say as much as they do outside. What the headers tell is remembered
    for each shard. A member that is a link stands for the one that it names. Raises UserError for a shard that is no
    tar file or is damaged (see `read_headers`), where there are no images in any, and for a patient or split column of
    another name than the usual that not every image has.
    """
    with ThreadPoolExecutor() as pool:
        read = pool.map(_rows_of, shards)
        tables = list(track(read, "reading shards", total=len(shards), progress=progress))
    read_from = zip(shards, tables, strict=True)
    named = [(f"{shard.name}/{row[0]}", row, stamp) for shard, (stamp, rows) in read_from for row in rows]
    if not named:
        raise UserError(f"--data {shards[0].parent}: no images in its {show_count(len(shards), 'shard')}")
    files = [name for name, _, _ in named]
    listing = Listing(
        root=shards[0].parent,
        files=files,
        offsets=np.array([row[1] for _, row, _ in named], dtype=np.int64),
        stamps=np.array([(row[2], mtime) for _, row, (_, mtime) in named], dtype=np.int64),
    )
    said = [row[3] for _, row, _ in named]
    # What some images lack is no column: its gaps would be a class of their own.
    complete = [name for name in said[0] if all(name in words for words in said)]
    require_columns(listing.root, complete, patient_column=patient_column, split_column=split_column)
    if not any(said):
        for name, value in said_by_folders([row[0] for _, row, _ in named]).items():
            setattr(listing, name, value)
        return listing
    columns = {name: [words[name] for words in said] for name in complete}
    listing.patients = columns.pop(patient_column, None)
    listing.splits = columns.pop(split_column, None)
    listing.columns = dict(columns)
    return listing


def require_shards(root: Path, files: Sequence[str], ends: Sequence[int], said_by: Path) -> None:
    """Raise UserError naming the first shard below `root` that is missing, or shorter than its members need.

    `files` are "shard.tar/member", `ends` the byte of the shard behind each, and `said_by` the file that says so. Each
    shard is looked up once, and none is opened.
    """
    needed: dict[str, int] = {}
    shard = ""
    for name, end in zip(files, ends, strict=True):
        # Members lie together, and a comparison is cheaper than taking a million names apart.
        if not shard or not name.startswith(shard + "/"):
            shard = split_member(name)[0]
        needed[shard] = max(end, needed.get(shard, 0))
    for shard, end in needed.items():
        try:
            size = os.stat(root / shard).st_size
        except FileNotFoundError:
            raise UserError(
                f"--data {root}: {shard}, which {said_by} lists, is not there; restore it, or copy the folder again"
            ) from None
        except OSError as error:
            raise UserError(f"--data {root}: {shard} cannot be read: {error.strerror or error}") from error
        if size < end:
            raise UserError(
                f"--data {root}: {shard} has {size:,} bytes, and its last image ends at {end:,} by {said_by}: it was "
                "cut short or written again; copy it again"
            )


def _rows_of(shard: Path) -> tuple[tuple[int, int], list[Row]]:
    """The shard's (bytes, mtime_ns) and its images, from the cache where these are what they were."""
    try:
        found = shard.stat()
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror or error}") from error
    stamp = (found.st_size, found.st_mtime_ns)
    cache = cache_file("members", shard)
    try:
        known = json.loads(cache.read_text())
        if tuple(known["stamp"]) == stamp:
            return stamp, known["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        # No cache, or a damaged one: the headers are simply read again.
        pass
    try:
        rows = _rows(shard)
    except UserError:
        raise
    except Damaged as error:
        raise UserError(f"{shard}: {error}") from error
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # whatever a rotten header leads to
        raise UserError(f"{shard}: cannot be read as an uncompressed tar file: {error}") from error
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps({"stamp": stamp, "rows": rows}))
    except OSError as error:
        print(f"warning: {cache} cannot be written ({error}); the shard's headers will be read again next time")
    return stamp, rows


def _rows(shard: Path) -> list[Row]:
    places, links = _places(shard)
    for name, target in links.items():
        # A link to what is not there keeps its own place, where reading finds out that it is one.
        places[name] = places[target] if target in places and target not in links else places[name]
    images: dict[str, str] = {}
    said: dict[str, dict[str, str]] = {}
    with shard.open("rb") as stream:
        for name, (at, size) in places.items():
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem:
                continue
            key, suffix = f"{folder}/{stem}", suffix.lower()
            if f".{suffix}" in IMAGE_SUFFIXES:
                images[name] = key
            elif suffix in ("cls", "json"):
                if size > _MOST_WORDS:
                    raise UserError(f"{shard}, member {name}: {size:,} bytes are too many for labels")
                said.setdefault(key, {}).update(_said(shard, name, suffix, os.pread(stream.fileno(), size, at)))
    return [(name, *places[name], said.get(key, {})) for name, key in images.items()]


def _places(shard: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The offset and bytes of every file and link in the shard, and the member that each link names."""
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    for member in read_headers(shard):
        name = member.name.removeprefix("./")
        if member.isreg() or member.islnk() or member.issym():
            places[name] = member.offset_data, member.size
            links.pop(name, None)
        if member.islnk():
            links[name] = member.linkname.removeprefix("./")
        elif member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    return places, links


def _said(shard: Path, name: str, suffix: str, data: bytes) -> dict[str, str]:
    """The labels in a .cls or .json member, as text."""
    try:
        if suffix == "cls":
            return {CLS_LABEL: data.decode().strip()}
        said: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shard}, member {name}: cannot be read as {suffix.upper()}: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"{shard}, member {name}: must be a JSON object of labels")
    return {key: str(value) for key, value in said.items() if isinstance(value, str | int | float)}
