"""Where the bytes of an image lie: in a file of its own, in a tar shard, or as a row of an .npz file."""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmoco.errors import UserError

# The reason of a file that is missing.
ABSENT = "no such file"
# Shards kept open at once, well below the 1024 descriptors that a process may have.
_OPEN_SHARDS = 128
_HEADER = tarfile.BLOCKSIZE
_MEMBER = re.compile(r"(.*?\.tar)/(.*)", re.IGNORECASE | re.DOTALL)


class BadFile(UserError):
    """An image that cannot be had: `file` is its path, `reason` what is wrong with it."""

    def __init__(self, file: str, reason: str) -> None:
        # Both as arguments, so that the exception survives being pickled on its way from a worker process.
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Store(Protocol):
    """Reads images by name. Safe to use from several threads."""

    def read(self, name: str, stamp: tuple[int, int] | None, offset: int | None) -> bytes | np.ndarray:
        """The encoded bytes of image `name`, or its pixels (H, W, 3) uint8 or uint16 where they are not encoded.

        `stamp` is (bytes, mtime_ns) as recorded; None, or a modification time of 0, leaves that unchecked. Raises
        BadFile where the image is missing, unreadable, or not what was recorded.
        """


def open_store(root: Path, offsets: np.ndarray | None) -> Store:
    """What reads the images of `root`: an .npz file, a folder of tar shards (with `offsets`), or a folder of files.

    Touches nothing on disk yet.
    """
    if root.suffix.lower() == ".npz":
        return Arrays(root)
    return Files(root) if offsets is None else Shards(root)


class Files:
    """One file an image; names are paths relative to `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, stamp: tuple[int, int] | None, offset: int | None = None) -> bytes:
        """See `Store.read`; `offset` is not used."""
        path = os.path.join(self._root, name)
        try:
            # Opening a named pipe would otherwise wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with io.FileIO(descriptor) as stream:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise BadFile(path, "not a file")
                _compare(path, (found.st_size, found.st_mtime_ns), stamp)
                data = stream.readall()
        except FileNotFoundError:
            raise BadFile(path, ABSENT) from None
        except OSError as error:
            raise BadFile(path, f"cannot be read ({error.strerror})") from error
        if len(data) != found.st_size:
            raise BadFile(path, f"changed while it was read: {len(data):,} bytes, was {found.st_size:,}")
        return data


class Shards:
    """Members of tar files below `root`, read in place; names are "shard.tar/member", and `offset` where it begins.

    A shard is opened when it is first needed and stays open.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self._root,)

    def read(self, name: str, stamp: tuple[int, int] | None, offset: int | None) -> bytes:
        """See `Store.read`. `offset` counts bytes from the shard's beginning; the modification time is the shard's."""
        path = os.path.join(self._root, name)
        if offset is None:
            raise BadFile(path, "no offset is recorded for it")
        try:
            descriptor = self._descriptor(split_member(name)[0])
            if stamp is not None:
                found = os.fstat(descriptor.number)
                _compare(path, (stamp[0], found.st_mtime_ns), stamp)
            # The member's header lies just before it, and tells a wrong offset from a right one.
            head = os.pread(descriptor.number, _HEADER + (stamp[0] if stamp is not None else 0), offset - _HEADER)
            header = tarfile.TarInfo.frombuf(head[:_HEADER], "utf-8", "surrogateescape")
            if header.islnk() or header.issym():
                raise BadFile(path, f"a link to {header.linkname}, which is not in its shard")
            size = header.size
            _compare(path, (size, 0), stamp and (stamp[0], 0))
            data = head[_HEADER:] if stamp is not None else os.pread(descriptor.number, size, offset)
        except tarfile.HeaderError as error:
            raise BadFile(path, f"its shard has no member at byte {offset:,}; was it written again?") from error
        except FileNotFoundError:
            raise BadFile(path, "no such shard") from None
        except OSError as error:
            raise BadFile(path, f"cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise BadFile(path, f"its shard is cut short: {len(data):,} of {size:,} bytes are there")
        return data

    def _descriptor(self, shard: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                found = self._open[shard] = _Descriptor(os.path.join(self._root, shard))
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
        return found


class _Descriptor:
    """A file open for reading, closed when the last thread that uses it lets go."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Arrays:
    """Rows of the arrays in one .npz file: "train/000012" is row 12 of `train_images`.

    Each array is read when it is first needed, and kept in memory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self._root,)

    def read(self, name: str, stamp: tuple[int, int] | None, offset: int | None = None) -> np.ndarray:
        """See `Store.read`: pixels (H, W, 3); `stamp` is that of the whole file, and `offset` is not used."""
        split, _, row = name.partition("/")
        path = f"{self._root}/{name}"
        images, found = self._array(f"{split}_images")
        _compare(path, found, stamp)
        if not row.isdecimal() or int(row) >= len(images):
            raise BadFile(path, f"there are {len(images):,} images in {split}_images")
        pixels = images[int(row)]
        return pixels if pixels.shape[2:] == (3,) else np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)

    def _array(self, key: str) -> tuple[np.ndarray, tuple[int, int]]:
        with self._lock:
            if key not in self._loaded:
                try:
                    with self._root.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                        found = os.fstat(stream.fileno())
                        self._loaded[key] = arrays[key], (found.st_size, found.st_mtime_ns)
                except KeyError:
                    raise BadFile(str(self._root), f"no array {key!r} in it") from None
                except Exception as error:  # zipfile and zlib raise nearly anything on damaged files
                    raise BadFile(str(self._root), f"cannot be read ({error})") from error
            return self._loaded[key]


def split_member(name: str) -> tuple[str, str]:
    """The shard and the member of "shard.tar/member" (or .TAR); all of `name` and "" where it is no such name."""
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _compare(path: str, found: tuple[int, int], stamp: tuple[int, int] | None) -> None:
    """Raise BadFile where (bytes, mtime_ns) `found` is not the recorded `stamp`."""
    if stamp is None:
        return
    if found[0] != stamp[0]:
        raise BadFile(path, f"changed since it was checked: {found[0]:,} bytes, was {stamp[0]:,}")
    if stamp[1] and found[1] != stamp[1]:
        raise BadFile(path, "changed since it was checked: written again, with the same number of bytes")
