"""Check once, before training, that every image decodes, and whether DALI decodes it to the same pixels."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.data.dali_check import DaliCheck
from fastmoco.data.decode import decode
from fastmoco.data.listing import Listing
from fastmoco.data.sizes import show_count
from fastmoco.data.store import ABSENT, BadFile, Store, open_store
from fastmoco.data.undecodable import DecoderMissing, Undecodable
from fastmoco.data.verdicts import Verdict, VerdictFile
from fastmoco.tracking import Lines

# Files that a thread checks before it says what it found: no more is lost when the check is interrupted.
_AT_ONCE = 16
# Bytes of pixels that a thread keeps before it asks DALI about them; a larger image is asked about by itself.
_HELD_BYTES = 64 << 20
# Files that a thread looks up before it is handed more: an errand for each would cost more than the look.
_STAMPED_AT_ONCE = 256


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and the decoder's reason."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """In a line how many files were left out, those that are not there apart from others, and the first of both."""
    absent = [item for item in skipped if item.reason == ABSENT]
    others = [item for item in skipped if item.reason != ABSENT]
    parts = [f"{show_count(len(some), 'file')}, the first {some[0]}" for some in (absent, others) if some]
    return f"left out {'; and '.join(parts)}".encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Checked:
    """What a check found of n images, in their order.

    `sizes` (n, 2) int32: heights and widths after EXIF rotation, (0, 0) where an image does not decode. `stamps` (n,
    2) int64: bytes and modification time in ns. `dali` (n,) bool: whether DALI decodes it to the same pixels.
    `skipped` lists what does not decode, and why.
    """

    sizes: np.ndarray
    stamps: np.ndarray
    dali: np.ndarray
    skipped: list[Skipped]


def verify(listing: Listing, *, decoder: str, workers: int = 0, progress: bool = True) -> Checked:
    """Decode every image of `listing` on the host and, where `decoder` is "dali" (and not "pillow"), by DALI too.

    `workers` threads share the work; 0: one a core. Answers are remembered in the user's cache folder, by name, size
    and modification time. `dali` of the result is all False for the decoder "pillow".
    """
    stamps = listing.stamps
    if stamps is None:
        stamps = _stamps(listing.root, listing.files)
    if listing.sizes is not None:
        return Checked(listing.sizes, stamps, np.zeros(len(listing.files), dtype=bool), [])
    remembered = VerdictFile(listing.root)
    found = remembered.find(listing.files, stamps)
    asked = decoder == "dali"
    unknown = [
        i
        for i in range(len(listing.files))
        if i not in found or (asked and found[i].dali is None and not found[i].reason)
    ]
    check = _Check(listing, stamps, asked)
    for places, verdicts in _in_parallel(check, unknown, workers, progress):
        found.update(zip(places, verdicts, strict=True))
        remembered.add((listing.files[i], stamps[i], verdict) for i, verdict in zip(places, verdicts, strict=True))
    sizes = np.zeros((len(listing.files), 2), dtype=np.int32)
    dali = np.zeros(len(listing.files), dtype=bool)
    skipped = []
    for i, name in enumerate(listing.files):
        sizes[i] = found[i].height, found[i].width
        dali[i] = asked and found[i].dali is True
        if found[i].reason:
            skipped.append(Skipped(name, found[i].reason))
    return Checked(sizes, stamps, dali, skipped)


def _in_parallel(
    check: _Check, places: list[int], workers: int, progress: bool
) -> Iterator[tuple[list[int], list[Verdict]]]:
    """Check the images at `places`, some at a time in each thread; yields what was found as it comes, in order."""
    chunks = [places[first : first + _AT_ONCE] for first in range(0, len(places), _AT_ONCE)]
    threads = workers or os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=not (progress and places), transient=True) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = bar.add_task("checking images", total=len(places))
        lines, done = Lines(bar.console, len(places)), 0
        left = iter(chunks)
        # A few chunks ahead, and not all of them, so that Ctrl-C has little to wait for.
        ahead = [(chunk, pool.submit(check.verdicts, chunk)) for chunk in islice(left, 2 * threads)]
        while ahead:
            chunk, future = ahead.pop(0)
            yield chunk, future.result()
            bar.advance(task, len(chunk))
            done += len(chunk)
            if progress:
                lines.say(f"checking images: {done:,} of {len(places):,}, ETA {lines.left(done)}")
            ahead += [(chunk, pool.submit(check.verdicts, chunk)) for chunk in islice(left, 1)]


class _Check:
    """Looks at images of a listing, in whichever thread asks."""

    def __init__(self, listing: Listing, stamps: np.ndarray, dali: bool) -> None:
        self._listing = listing
        self._stamps = stamps
        self._dali = dali
        self._store: Store = open_store(listing.root, listing.offsets)
        self._own = threading.local()

    def verdicts(self, places: Sequence[int]) -> list[Verdict]:
        """The verdict on each of the images at `places`."""
        found: list[Verdict] = []
        waiting: dict[int, tuple[bytes, np.ndarray]] = {}
        held = 0
        for i, place in enumerate(places):
            image = self._image(place)
            if isinstance(image, Verdict):
                found.append(image)
                continue
            pixels = image[1]
            found.append(Verdict(*pixels.shape[:2]))
            if not self._dali:
                continue
            if waiting and held + pixels.nbytes > _HELD_BYTES:
                self._ask(waiting, found)
                waiting, held = {}, 0
            waiting[i] = image
            held += pixels.nbytes
        if waiting:
            self._ask(waiting, found)
        return found

    def _image(self, place: int) -> tuple[bytes, np.ndarray] | Verdict:
        """The bytes and pixels, or why there are none."""
        name = self._listing.files[place]
        offsets = self._listing.offsets
        stamp = (int(self._stamps[place, 0]), int(self._stamps[place, 1]))
        try:
            data = self._store.read(name, stamp, None if offsets is None else int(offsets[place]))
            assert isinstance(data, bytes), "arrays are not checked one by one"
            return data, decode(data, name)
        except BadFile as error:
            return Verdict(reason=error.reason, passing=True)
        except Undecodable as error:
            return Verdict(reason=str(error), passing=isinstance(error, DecoderMissing))
        except MemoryError:
            return Verdict(reason="not enough memory", passing=True)

    def _ask(self, images: dict[int, tuple[bytes, np.ndarray]], found: list[Verdict]) -> None:
        """Say in the verdicts `found` of `images`, by their places in it, whether DALI decodes each to its pixels."""
        if not hasattr(self._own, "dali"):
            self._own.dali = DaliCheck(_AT_ONCE)
        for i, agrees in zip(images, self._own.dali.agreed(list(images.values())), strict=True):
            found[i] = replace(found[i], dali=agrees)


def _stamps(root: Path, files: Sequence[str]) -> np.ndarray:
    """(n, 2) int64 bytes and modification times; (0, 0) for what cannot be found, which reading it will explain."""

    def stamp(name: str) -> tuple[int, int]:
        try:
            found = os.stat(os.path.join(root, name))
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def some(first: int) -> list[tuple[int, int]]:
        return [stamp(name) for name in files[first : first + _STAMPED_AT_ONCE]]

    # In several threads, since a network file system takes its time to answer each.
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(some, range(0, len(files), _STAMPED_AT_ONCE))
        return np.array([each for part in parts for each in part], dtype=np.int64).reshape(-1, 2)
