"""The members of a tar shard, in order; a damaged header is an error, not the shard's end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20


class Damaged(tarfile.ReadError):
    """The message says at which byte of a tar file its headers end in something other than zeros."""


def read_headers(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of the uncompressed tar file `shard`, none of which is kept.

    Every tar file ends with zeros. Where a header is rotten, or the file ends without them (it was cut between two
    members), or something follows them, Damaged is raised: what comes after that place would be lost without a word.
    Raises OSError, tarfile.TarError and ValueError otherwise, as tarfile does.
    """
    last = ""
    with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:
        while (member := tar.next()) is not None:
            last = member.name
            yield member
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile takes a header that it does not understand for the end, but where it is the first.
        at = int(tar.offset)
        if not _zeros_to_the_end(stream, at):
            after = f", after member {last}" if last else ""
            raise Damaged(f"damaged at byte {at:,}{after}; copy or pack it again")


def _zeros_to_the_end(stream: BinaryIO, at: int) -> bool:
    """Whether at least one block follows byte `at`, and nothing but zeros."""
    stream.seek(at)
    block = stream.read(tarfile.BLOCKSIZE)
    whole = len(block) == tarfile.BLOCKSIZE
    while block:
        if block.count(0) < len(block):
            return False
        block = stream.read(_CHUNK)
    return whole
