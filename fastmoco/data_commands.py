"""`fastmoco data COMMAND`: what can be done with images without training on them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fastmoco.errors import UserError


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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "scan": scan,
    "preview": preview,
    "stats": stats,
    "pack": pack,
}


def usage() -> str:
    """The text of `fastmoco data --help`."""
    lines = [f"  {name:<10}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "usage: fastmoco data COMMAND [OPTIONS]\n\n" + "\n".join(lines)


def dispatch(args: list[str]) -> int:
    """Run the command that `args` name; returns the exit status, raises UserError for a mistake."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r} in fastmoco data: {hint}")
    return COMMANDS[name](rest)
