"""The processes of a run: which one this is, and what it sent to the others."""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`; `local_rank` of the `local_size` on its machine.

    `group` is torch's group of all of them, on `device` (NCCL or gloo); `control` is one over the host's memory (gloo),
    for small decisions that must not wait for a GPU. Both are None in a world of one, where nothing is sent and
    torch.distributed is not used. `sent` counts the bytes that this process sent to others, by what they were for:
    "gradients", "keys", "shuffle", "norms", "losses", ..., as the collective's algorithm moves them (collectives.py).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = CPU
    group: Any = None
    control: Any = None
    sent: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: it writes the run folder and prints."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """The name of this machine, SLURM's where it has one for it."""
        return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
