"""What the trainer asks of an engine, whichever it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmoco.distributed.world import World

COMPUTE_DTYPE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context that a forward in `precision` runs in."""
    if precision not in ("bf16", "fp16"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=COMPUTE_DTYPE[precision])


class Engine(Protocol):
    """Runs a module on one device, alone or with other processes; the trainer sees only these methods.

    `blocked` is a 0-d float32 tensor on the device: 0, or 1 from the first loss on that is not finite, be it another
    process's. While it is 1 weights and momentum stay as they are.

    What a checkpoint keeps comes as full tensors by name from `state`, which every process has to call, and goes back
    by `load`: neither the engine nor the number of processes that wrote it matters to the one that reads it.
    """

    world: World
    device: torch.device
    precision: str
    blocked: Tensor
    name: str

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds but a part of the weights between two steps."""

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """What a forward and its backward run in; gradients are shared in the `last` of a step only."""

    def forward(self, *inputs: Tensor | None) -> Any:
        """What the module returns, in the precision it is run in."""

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        """Add the gradient of sum(losses) / divisor; block the coming steps if any loss is not finite."""

    def step(self, lr: float, *, ema: float) -> None:
        """One optimiser step at learning rate `lr`, unless blocked, and the averages' at momentum `ema`."""

    def keep_gradients(self) -> None:
        """Have every backward write its gradients over those before, in the same memory, as a CUDA graph does."""

    def state(self) -> dict[str, Tensor]:
        """The module's parameters ("module.*"), SGD's momentum ("momentum.*", by parameter) and, in fp16, the loss
        scale ("scaler.*"); full tensors in the dtype that they are kept in."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, of this or another engine. Raises UserError where it does not fit."""
