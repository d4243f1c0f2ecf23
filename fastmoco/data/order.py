"""Which image comes when: a pure function of (seed, epoch), so that resuming needs only a number."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmoco.errors import UserError


@dataclass(frozen=True)
class Order:
    """The sequence of micro-batches over a set of `samples` images, reshuffled each epoch.

    `drop_last` leaves out the incomplete micro-batch at an epoch's end (other images each epoch, since the order
    changes); without it that micro-batch is smaller and every image comes once an epoch.

    Raises UserError where the images do not fill a single micro-batch.
    """

    samples: int
    batch_size: int
    seed: int
    drop_last: bool = True
    _last: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.samples < 1 or (self.drop_last and self.samples < self.batch_size):
            raise UserError(
                f"{self.samples} images do not fill one batch of {self.batch_size}: lower --batch-size, "
                "give more images, or pass --no-drop-last"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch."""
        if self.drop_last:
            return self.samples // self.batch_size
        return -(-self.samples // self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The (samples,) int64 order of the images in `epoch`."""
        if epoch not in self._last:
            self._last.clear()
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 0x0EDE5], counter=[0, 0, 0, epoch]))
            self._last[epoch] = rng.permutation(self.samples)
        return self._last[epoch]

    def batch(self, t: int) -> tuple[int, np.ndarray]:
        """The epoch and the (N,) sample indices of micro-batch `t`, counted from the start of training."""
        epoch, place = divmod(t, self.batches_per_epoch)
        return epoch, self.permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
