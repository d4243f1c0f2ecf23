"""Loss scaling for float16 gradients, without the host ever waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

_INITIAL, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """The factor on the loss that keeps float16 gradients from vanishing (Micikevicius et al. 2018).

    It is halved after a step whose gradients overflowed, and doubled after 2,000 that did not. All of it lives in 0-d
    float32 tensors on the device: `scale`, and `good`, the steps since the scale last changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _INITIAL, device=device)
        self.good = torch.zeros((), device=device)

    def unscale_(self, gradients: list[Tensor]) -> Tensor:
        """Divide `gradients` by the scale, in place; 1 if any of them is not finite, else 0, as a 0-d float32."""
        if not gradients:
            return torch.zeros_like(self.scale)
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, float("inf"))])
        torch._foreach_mul_(gradients, 1 / self.scale)
        return (~largest.isfinite().all()).to(self.scale.dtype)

    def update(self, overflowed: Tensor) -> None:
        """Adjust the scale after a step that `overflowed` (1) or did not (0)."""
        grown = self.good + 1 >= _INTERVAL
        factor = torch.where(overflowed > 0, _BACKOFF, torch.where(grown, _GROWTH, 1.0))
        self.good.copy_(torch.where((overflowed > 0) | grown, 0.0, self.good + 1))
        self.scale.mul_(factor)
