"""Which image comes when: a pure function of (seed, epoch), so that resuming needs only a number."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastmoco.data.pairs import Pairs
from fastmoco.errors import UserError


class Slots(NamedTuple):
    """A micro-batch's places: the images `indices` (N,) int64 of `epoch`, and `keys` (N,) int64, from which the second
    views are cut: the same, or their partners.

    `turns` (N,) int64 is 0 where an image stands in its own place of the epoch, and the place plus one where it stands
    in for another or fills up the last batch, so that its views are others there. `places` (N,) int64 are the places.
    """

    epoch: int
    indices: np.ndarray
    turns: np.ndarray
    places: np.ndarray
    keys: np.ndarray

    @property
    def images(self) -> list[int]:
        """All images that are shown, each once."""
        return list(dict.fromkeys([*self.indices.tolist(), *self.keys.tolist()]))


@dataclass(frozen=True)
class Order:
    """The sequence of micro-batches over a set of `samples` images, reshuffled each epoch.

    `batch_size` images make a micro-batch of all shards together; shard `shard` of `shards` has its `local_size`
    consecutive rows of each. So the images of micro-batch t do not depend on the number of shards. `drop_last` leaves
    out the incomplete micro-batch at an epoch's end (other images each epoch, since the order changes); without it that
    micro-batch is filled up with the first images of the epoch, and every image comes at least once an epoch.
    `pairs` has the partners of the images, None: each is its own. Partners come besides, and change nothing of the
    sequence.

    Raises UserError where the images do not fill a single micro-batch, the shards do not divide one, or `pairs` is of
    another number of images.
    """

    samples: int
    batch_size: int
    seed: int
    drop_last: bool = True
    shard: int = 0
    shards: int = 1
    pairs: Pairs | None = None
    _last: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")
        if not 0 <= self.shard < self.shards:
            raise UserError(f"shard {self.shard} of {self.shards}: shards are numbered from 0")
        if self.batch_size % self.shards:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared out evenly to {self.shards} processes: give a "
                f"multiple of {self.shards}"
            )
        if self.samples < 1 or (self.drop_last and self.samples < self.batch_size):
            raise UserError(
                f"{self.samples} images do not fill one batch of {self.batch_size}: lower --batch-size, "
                "give more images, or pass --no-drop-last"
            )
        if self.pairs is not None and len(self.pairs) != self.samples:
            raise UserError(f"pairs of {len(self.pairs)} images are given with an order of {self.samples}")

    @property
    def local_size(self) -> int:
        """Images of a micro-batch that are this shard's."""
        return self.batch_size // self.shards

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch."""
        if self.drop_last:
            return self.samples // self.batch_size
        return -(-self.samples // self.batch_size)

    @property
    def left_out(self) -> int:
        """Images that an epoch does not show."""
        return self.samples % self.batch_size if self.drop_last else 0

    def permutation(self, epoch: int) -> np.ndarray:
        """The (samples,) int64 order of the images in `epoch`."""
        found = self._last.get(epoch)
        if found is None:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 0x0EDE5], counter=[0, 0, 0, epoch]))
            found = rng.permutation(self.samples)
            self._last.clear()
            self._last[epoch] = found
        return found

    def batch(self, t: int) -> Slots:
        """This shard's part of micro-batch `t`, counted from the start of training."""
        epoch, number = divmod(t, self.batches_per_epoch)
        places = number * self.batch_size + self.shard * self.local_size + np.arange(self.local_size)
        indices = self.permutation(epoch)[places % self.samples]
        turns = np.where(places < self.samples, 0, places + 1)
        keys = indices if self.pairs is None else self.pairs.partners(self.seed, epoch, indices, turns)
        return Slots(epoch, indices, turns, places, keys)

    def without(self, slots: Slots, met: Container[int], bad: Container[int]) -> Slots:
        """`slots` with others, none of which is among `bad`, in place of those among `met`.

        A substitute brings a partner of its own; a partner's place goes to another of the patient's images, or to the
        image itself. Raises UserError where every image is bad.
        """
        indices, turns, keys = slots.indices.copy(), slots.turns.copy(), slots.keys.copy()
        for row, place in enumerate(slots.places.tolist()):
            replaced = int(indices[row]) in met
            if replaced:
                indices[row], turns[row] = self.substitute(slots.epoch, place, bad), place + 1
            if replaced or int(keys[row]) in met:
                keys[row] = self._partner(slots.epoch, int(indices[row]), int(turns[row]), bad)
        return slots._replace(indices=indices, turns=turns, keys=keys)

    def substitute(self, epoch: int, place: int, bad: Container[int]) -> int:
        """The image that comes into `place` of `epoch` where the one that belongs there is among `bad`.

        It is the one half an epoch further on, or the next after that which is not bad: the two times that it comes in
        the epoch are then far apart. Raises UserError where every image is bad.
        """
        order = self.permutation(epoch)
        for step in range(self.samples):
            index = int(order[(place + self.samples // 2 + step) % self.samples])
            if index not in bad:
                return index
        raise UserError("no image is left that can be read")

    def _partner(self, epoch: int, index: int, turn: int, bad: Container[int]) -> int:
        return index if self.pairs is None else self.pairs.partner(self.seed, epoch, index, turn, bad)
