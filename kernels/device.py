"""What launchers share: the device they launch on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@lru_cache
def processors(device: torch.device) -> int:
    """How many programs run at a time, at the least: the multiprocessors; 4 where Triton interprets on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_its_device(launcher: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Launches on the device of the first argument: Triton by itself takes the current one, whatever it is given."""

    @wraps(launcher)
    def wrapped(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return wrapped
