"""The learning rate as a pure function of the step, so that resuming needs only the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    It rises linearly over the first `warmup` steps, reaching `peak` at the last of them, then stays ("constant") or
    follows half a cosine that would reach 0 at step `total` ("cosine", Loshchilov and Hutter 2017, eq. 5).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
