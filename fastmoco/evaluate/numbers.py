"""Numbers as JSON has them."""

from __future__ import annotations

import math


def finite(value: float | None) -> float | None:
    """`value`, or None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else float(value)
