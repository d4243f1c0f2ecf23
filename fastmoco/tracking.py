"""How far long work is: a bar on a terminal, and lines some seconds apart on what is none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

LINES_APART = 10.0

Item = TypeVar("Item")


class Lines:
    """Lines on how far work of `total` parts is, LINES_APART seconds after one another at the least, with the time that
    is left; for a console that is no terminal."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._began = self._told = time.monotonic()

    def left(self, done: int) -> str:
        """The time that the parts after `done` take at the pace of those before, as h:mm:ss."""
        seconds = (time.monotonic() - self._began) / max(1, done) * (self._total - done)
        return str(timedelta(seconds=round(seconds)))

    def say(self, text: str) -> None:
        """Print `text`, unless this is a terminal or the last was just now."""
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= LINES_APART:
            self._told = now
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def track(
    items: Iterable[Item],
    what: str,
    *,
    total: int | None = None,
    each: int = 1,
    images: int | None = None,
    progress: bool = True,
) -> Iterator[Item]:
    """The `items`, one after the other, while it is shown how many are done, of `total` or as many as they say they
    are. `what` says what is done with them. Where an item is `each` of `images`, lines count those."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    console = Console()
    if not progress:
        yield from items
    elif console.is_terminal:
        yield from bar(items, what, total=total, transient=True, console=console)
    else:
        lines = Lines(console, total)
        of = total if images is None else images
        for done, item in enumerate(items, start=1):
            yield item
            lines.say(f"{what}: {min(done * each, of):,} of {of:,}, ETA {lines.left(done)}")
