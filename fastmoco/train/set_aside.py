"""The images that went bad in any process of a run, known to all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fastmoco.data.quarantine import Bad, Quarantine
from fastmoco.distributed.agreement import texts
from fastmoco.distributed.world import World


class SetAside:
    """A quarantine that the processes of `world` tell each other of.

    The loader of each adds to `quarantine` what it meets, from a thread of its own; `share` brings that to the others.
    """

    def __init__(self, world: World, limit: int, entries: Iterable[dict[str, Any]]) -> None:
        self.world = world
        self.quarantine = Quarantine(limit, entries)
        self._shared = {bad.index for bad in self.quarantine.entries}
        self._told = len(self.quarantine)

    def unshared(self) -> int:
        """How many images this process has met that it has not shared."""
        return sum(bad.index not in self._shared for bad in list(self.quarantine.entries))

    def share(self) -> None:
        """Have every process know what any has met. All call it; raises TooManyBad where that is too many."""
        mine = [asdict(bad) for bad in list(self.quarantine.entries) if bad.index not in self._shared]
        met = [Bad(**entry) for text in texts(self.world, json.dumps(mine)) for entry in json.loads(text)]
        self._shared |= {bad.index for bad in met}
        for bad in met:
            self.quarantine.add(bad)

    def news(self) -> int:
        """How many entries, at the end of the quarantine's, were added since this was last asked."""
        new = len(self.quarantine) - self._told
        self._told += new
        return new
