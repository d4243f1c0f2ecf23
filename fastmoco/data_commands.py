"""`fastmoco data COMMAND`: what can be done with images without training on them."""

from __future__ import annotations

from fastmoco.commands import Command


def scan(args: list[str]) -> int:
    """Check that every image decodes, and list those that do not."""
    from fastmoco.data.scan import scan_command

    return scan_command(args)


def preview(args: list[str]) -> int:
    """Draw images beside the views that training with a recipe would make of them."""
    from fastmoco.preview import preview_command

    return preview_command(args)


def stats(args: list[str]) -> int:
    """Say what a set of images is made of: sizes, formats, classes, duplicates."""
    from fastmoco.data.stats_command import stats_command

    return stats_command(args)


def pack(args: list[str]) -> int:
    """Pack images into tar shards with an index, for network file systems."""
    from fastmoco.data.pack_command import pack_command

    return pack_command(args)


COMMANDS: dict[str, Command] = {
    "scan": scan,
    "preview": preview,
    "stats": stats,
    "pack": pack,
}
