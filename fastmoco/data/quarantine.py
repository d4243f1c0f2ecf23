"""Images that could be read when the run began and cannot any more: set aside for the rest of the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.store import BadFile
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


class ImagesGone(UserError):
    """So many images cannot be read that it is their folder that is wrong; none of them was set aside for that."""


# So many images are looked at where one is bad, or a run begins with a list that was made before.
_LOOKED_AT = 20


def check_there(manifest: Manifest) -> None:
    """Raise ImagesGone where of some images, spread over the whole of `manifest`, none can be read: a disk that is not
    mounted, a folder that was moved, or copies whose times are not those on record."""
    problem = None
    places = np.unique(np.linspace(0, len(manifest) - 1, _LOOKED_AT).astype(int))
    for index in places.tolist():
        try:
            manifest.read(index)
            return
        except BadFile as bad:
            problem = problem or bad
    raise ImagesGone(
        f"of {len(places)} images looked for under {manifest.root} none is there as it was when it was checked, the "
        f"first {problem}. Is the disk mounted, and is this the folder? For a copy with other times, scan it again "
        "(fastmoco data scan), or go on with a run by naming the copy with --data"
    )


class Quarantine:
    """The images that went bad, of which there may be `limit`; TooManyBad where `entries` are more already.

    What is in it goes into the checkpoint (`state`), and a resumed run starts with it (`entries`): a file that was
    mended meanwhile stays out, so that the images of a run do not depend on when it was stopped.

    `option` is what its user gives the limit by, `remedy` what to do where it is passed.
    """

    option = "--max-bad"
    remedy = "What was set aside stays aside: go on with --resume and a higher --max-bad, or start anew"

    def __init__(self, limit: int, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.limit = limit
        self.entries = [Bad(**entry) for entry in entries]
        self._indices = {bad.index for bad in self.entries}
        self.check()

    def __contains__(self, index: object) -> bool:
        return index in self._indices

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, bad: Bad) -> None:
        """Set an image aside. Raises TooManyBad, with the list, where that is one too many."""
        if bad.index not in self._indices:
            self._indices.add(bad.index)
            self.entries.append(bad)
            self.check()

    def check(self, *, of: int | None = None) -> None:
        """Raise TooManyBad, with the list, where there are more than the limit, or all `of` a set's images."""
        count = len(self.entries)
        if count > self.limit or count == of:
            more = f"all {of} there are" if count == of else f"more than {self.option} {self.limit}"
            listed = "\n  ".join(str(entry) for entry in self.entries)
            raise TooManyBad(f"{count} image(s) could not be read any more, {more}:\n  {listed}\n{self.remedy}")

    def state(self) -> list[dict[str, Any]]:
        """The entries as plain JSON values."""
        return [asdict(entry) for entry in self.entries]
