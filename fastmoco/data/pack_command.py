"""`fastmoco data pack`: write a set of images as tar shards, or check shards that were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmoco.arguments import read_arguments
from fastmoco.data.manifest import Manifest
from fastmoco.data.manifest_file import SHARD_INDEX, read_manifest_file
from fastmoco.data.members import compare
from fastmoco.data.pack import pack
from fastmoco.data.sizes import parse_bytes, show_count
from fastmoco.data.source import Source
from fastmoco.data.verify import describe_skipped
from fastmoco.errors import UserError
from fastmoco.results import try_folder


@dataclass(kw_only=True)
class PackArgs(Source):
    """Pack images into tar shards (WebDataset's layout) with an index: millions of small files are slow to read from a
    network file system, and some thousands of large ones are not. Interrupted, the same command goes on."""

    out: Path
    """Folder for the shards and index.csv; train on it with --data."""
    shard_size: str = "1GB"
    """About how large a shard becomes."""
    seed: int | None = None
    """Shuffle the images with this seed, so that a shard read from end to end is a mixture; in their order if not
    given."""
    check: bool = False
    """Pack nothing: compare every image in folder --out with the hash that was packed with it, and with the index."""


def pack_command(args: list[str]) -> int:
    """Pack, or check. Returns the exit status: 1 where --check finds something wrong, otherwise 0."""
    options = read_arguments(PackArgs, prog="fastmoco data pack", args=args)
    if options.check:
        return _check(options)
    shard_bytes = parse_bytes(options.shard_size, "--shard-size")
    try_folder(options.out)
    manifest = options.manifest()
    if manifest.skipped:
        print(describe_skipped(manifest.skipped))
    packed = pack(manifest, options.out, shard_bytes=shard_bytes, seed=options.seed, workers=options.threads())
    shards = {name.split("/", 1)[0] for name in packed.files}
    held = f"{show_count(len(packed), 'image')} in {show_count(len(shards), 'shard')}"
    print(f"{options.out}: {held}, read back and compared, and {SHARD_INDEX}")
    return 0


def _check(options: PackArgs) -> int:
    index = options.out / SHARD_INDEX
    if not options.out.is_dir():
        raise UserError(f"--out {options.out}: no such folder")
    if not index.is_file():
        if any(options.out.glob("*.tar")):
            raise UserError(
                f"--out {options.out}: no {SHARD_INDEX} in it, so packing has not ended; pack again, without --check"
            )
        raise UserError(f"--out {options.out}: no {SHARD_INDEX}, no shard in it; name a folder that was packed into")
    # Not as for training, which the first shard that is missing or too short stops: here all are to be named.
    packed = Manifest(root=options.out, **read_manifest_file(index))
    if packed.offsets is None:
        raise UserError(f"{index}: lists no members of shards; name a folder that was packed into")
    wrong = compare(packed, workers=options.threads())
    for line in wrong:
        print(line)
    found = f"{show_count(len(wrong), 'thing')} wrong" if wrong else "all right"
    print(f"{options.out}: {show_count(len(packed), 'image')}, {found}")
    return 1 if wrong else 0
