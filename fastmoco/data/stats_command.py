"""`fastmoco data stats`: a table of what a set of images is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.arguments import read_arguments
from fastmoco.atomic import write_text
from fastmoco.data.source import Source
from fastmoco.data.stats import statistics, summary
from fastmoco.results import try_out, unwritable


@dataclass(kw_only=True)
class StatsArgs(Source):
    """Sizes, formats, brightness and classes of a set of images; duplicates, empty ones, patients in several splits."""

    out: Path | None = None
    """JSON file to write all of it to, every duplicate included."""


def stats_command(args: list[str]) -> int:
    """Print the table and write the file. Returns the exit status, 0."""
    options = read_arguments(StatsArgs, prog="fastmoco data stats", args=args)
    if options.out is not None:
        try_out(options.out)
    found = statistics(options.manifest(), workers=options.threads())
    table = Table(title=str(options.images()), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in summary(found):
        # Names of files may hold what would be markup.
        table.add_row(what, Text(value.encode(errors="backslashreplace").decode()))
    Console().print(table)
    if options.out is not None:
        try:
            write_text(options.out, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise unwritable(options.out, error) from error
        print(f"{options.out}: written")
    return 0
