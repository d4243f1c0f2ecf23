"""The objectives beside MoCo one way, as the tests have them."""

from __future__ import annotations

from typing import Any

import torch

TARGETS = torch.tensor([0, 1, 1, -1, 2, 0, 1, 2, -1, 2, 0, 0])
TWINS = {"objective": "barlow-twins", "barlow_correlation": "global", "barlow_off_diagonal": 0.005, "barlow_scale": 0.1}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True, "margin": 0.1},
    "simclr": {"objective": "simclr", "margin": 0.1},
    "supcon": {"objective": "supcon"},
    "barlow-twins": TWINS,
    "mixed": TWINS | {"mix_weight": 3.0},
}
