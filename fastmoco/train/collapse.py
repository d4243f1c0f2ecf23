"""Whether the embeddings of all images have become one, after which nothing is learned."""

from __future__ import annotations

from collections.abc import Iterable

from fastmoco.train.metrics import Row

# `embedding_std` below this, for so many steps one after the other. Of trained encoders it is seldom below 0.1.
LEAST, STEPS = 0.01, 20


class Collapse:
    """Watches the spread of the embeddings, and tells once where there is none."""

    def __init__(self) -> None:
        self.told, self._steps = False, 0

    def read(self, rows: Iterable[Row]) -> str | None:
        """What to tell of the next steps, if anything; None ever after."""
        for row in rows:
            self._steps = self._steps + 1 if row["embedding_std"] < LEAST else 0
            if self._steps >= STEPS and not self.told:
                self.told = True
                return (
                    f"warning: the embeddings of all images have been one for {STEPS} steps (spread below {LEAST}): "
                    "collapse, of which nothing is learned; start anew with a lower --lr or a longer --warmup-epochs"
                )
        return None
