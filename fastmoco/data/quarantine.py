"""Images that could be read when the run began and cannot any more: set aside for the rest of the run."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fastmoco.errors import UserError


@dataclass(frozen=True, slots=True)
class Bad:
    """Image `index`, its `file`, why it cannot be read, and the micro-batch for which it was to be."""

    index: int
    file: str
    reason: str
    batch: int

    def __str__(self) -> str:
        return f"{self.file}: {self.reason} (at micro-batch {self.batch})"


class TooManyBad(UserError):
    """More images went bad than the run puts up with; the message lists them."""


class Quarantine:
    """The images that went bad, of which there may be `limit`; TooManyBad where `entries` are more already.

    What is in it goes into the checkpoint (`state`), and a resumed run starts with it (`entries`): a file that was
    mended meanwhile stays out, so that the images of a run do not depend on when it was stopped.
    """

    def __init__(self, limit: int, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.limit = limit
        self.entries = [Bad(**entry) for entry in entries]
        self._indices = {bad.index for bad in self.entries}
        # The loader's thread and the kNN monitor both add.
        self._lock = threading.Lock()
        self.check()

    def __contains__(self, index: object) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, bad: Bad) -> None:
        """Set an image aside. Raises TooManyBad, with the list, where that is one too many."""
        with self._lock:
            if bad.index in self._indices:
                return
            self._indices.add(bad.index)
            self.entries.append(bad)
        self.check()

    def check(self, *, of: int | None = None) -> None:
        """Raise TooManyBad, with the list, where there are more than the limit, or all `of` a set's images."""
        count = len(self.entries)
        if count > self.limit or count == of:
            more = f"all {of} there are" if count == of else f"more than --max-bad {self.limit}"
            listed = "\n  ".join(str(entry) for entry in self.entries)
            raise TooManyBad(f"{count} image(s) could not be read any more, {more}:\n  {listed}")

    def state(self) -> list[dict[str, Any]]:
        """The entries as plain JSON values."""
        return [asdict(entry) for entry in self.entries]
