"""Images that could be read when the run began and cannot any more: set aside for the rest of the run."""

from __future__ import annotations

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
    """The images that went bad, of which there may be `limit`.

    What is in it goes into the checkpoint (`state`), and a resumed run starts with it (`entries`): a file that was
    mended meanwhile stays out, so that the images of a run do not depend on when it was stopped.
    """

    def __init__(self, limit: int, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.limit = limit
        self.entries = [Bad(**entry) for entry in entries]
        self._indices = {bad.index for bad in self.entries}

    def __contains__(self, index: object) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, bad: Bad) -> None:
        """Set an image aside. Raises TooManyBad, with the list, where that is one too many."""
        if bad.index in self._indices:
            return
        self._indices.add(bad.index)
        self.entries.append(bad)
        if len(self.entries) > self.limit:
            raise TooManyBad(
                f"{len(self.entries)} image(s) could not be read any more, more than --max-bad {self.limit}:\n  "
                + "\n  ".join(str(entry) for entry in self.entries)
            )

    def state(self) -> list[dict[str, Any]]:
        """The entries as plain JSON values."""
        return [asdict(entry) for entry in self.entries]
