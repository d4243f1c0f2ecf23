"""The objectives beside MoCo one way, as the tests have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.distributed.exchange import draw_order

TARGETS = torch.tensor([0, 1, 1, -1, 2, 0, 1, 2, -1, 2, 0, 0])
TWINS = {"objective": "barlow-twins", "barlow_correlation": "global", "barlow_off_diagonal": 0.005, "barlow_scale": 0.1}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True, "margin": 0.1},
    "simclr": {"objective": "simclr", "margin": 0.1},
    "supcon": {"objective": "supcon"},
    "barlow-twins": TWINS,
    "mixed": TWINS | {"mix_weight": 3.0},
}


def changes_of(name: str) -> dict[str, Any]:
    """What a run of it is told: its losses, and the head that they want."""
    own = OBJECTIVES[name]
    return own | ({"head": "projector"} if own.get("objective") == "barlow-twins" else {})


def order_within(parts: int, seed: int = 0, micro_batch: int = 0, rows: int = 12) -> Tensor:
    """An order of all rows that keeps each to its process, of `parts`: theirs one after the other."""
    part = rows // parts
    return torch.cat([rank * part + draw_order(seed, micro_batch, rank, part) for rank in range(parts)])
