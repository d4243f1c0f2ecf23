"""Saving a run's state: rank 0 writes it, and all processes know of it, or of why it could not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastmoco.data.quarantine import Quarantine
from fastmoco.distributed.agreement import everywhere, texts
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint, Store, non_finite
from fastmoco.train.trainer import Trainer


class NonFiniteLoss(UserError):
    """A loss or a weight is NaN or infinite; the message names the step, the part and the last good checkpoint."""


class Saving:
    """The checkpoints of `trainer` in `store`, with what else a run goes on from: the fingerprint of its images, where
    they lie, and which of them were set aside. Every process calls the same of it at the same step.

    saved_at: the step of the checkpoint that is there, None where there is none.
    """

    def __init__(
        self,
        store: Store,
        trainer: Trainer,
        *,
        fingerprint: str,
        root: str,
        quarantine: Quarantine,
        saved_at: int | None,
    ) -> None:
        self.store = store
        self.trainer = trainer
        self.world = trainer.world
        self._fingerprint, self._root, self._quarantine = fingerprint, root, quarantine
        self._saved_at = saved_at

    def last_good(self) -> str:
        """What rank 0 knows of the last good checkpoint, once it has written all, which the others wait for."""
        return texts(self.world, self.store.last_good() if self.world.first else "")[0]

    def save(self, step: int, *, now: bool, before: Callable[[], None]) -> Path:
        """Have the state after `step` written: `now`, before this returns, or while training goes on; its file.

        before: as `Store.save` takes it. Raises NonFiniteLoss where a weight is not finite, and as `Store` does.
        """
        checkpoint = self.trainer.checkpoint(step, self._fingerprint)
        self._saved_at = step if now else None
        if self.world.first:
            checkpoint.meta |= {"root": self._root, "quarantine": self._quarantine.state()}
        everywhere(self.world, lambda: self._write(checkpoint, now=now, before=before))
        return self.store.path(step)

    def saved(self, step: int, *, before: Callable[[], None]) -> Path:
        """The file of the state after `step`, written now where it is not yet known to be."""
        return self.store.path(step) if step == self._saved_at else self.save(step, now=True, before=before)

    def _write(self, checkpoint: Checkpoint, *, now: bool, before: Callable[[], None]) -> None:
        if not self.world.first:
            return
        broken = non_finite(checkpoint.tensors)
        if broken:
            raise NonFiniteLoss(
                f"step {checkpoint.step}: {broken[0]} and {len(broken) - 1} more tensors are not finite, so no "
                f"checkpoint was written; {self.store.last_good()}. A lower --lr or a longer --warmup-epochs may help"
            )
        save = self.store.save_now if now else self.store.save
        save(checkpoint, before=before)
