"""How one process runs the objective: precision, gradients, the guarded optimiser step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.train.config import OptimConfig
from fastmoco.train.copies import Copies
from fastmoco.train.update import make_update

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class SingleProcess:
    """Runs `module` on one device; the trainer sees only these methods.

    `averages`: the moving averages of some of the module's trained parameters, by the parameters' names.
    `multiplied`: names of the weights that are rounded to bfloat16 when they are multiplied.
    `blocked` is a 0-d float32 tensor on the device: 0, or 1 from the first non-finite loss on. While it is 1 the
    optimiser leaves weights and momentum as they are. Nothing here reads it back to the host.
    """

    def __init__(
        self,
        module: nn.Module,
        averages: Mapping[str, Tensor],
        multiplied: list[str],
        optim: OptimConfig,
        *,
        precision: str,
        device: torch.device,
    ) -> None:
        self.module = module
        self.device = device
        self.precision = precision
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.blocked = torch.zeros((), device=device)
        # Several micro-batches sum their gradients, which takes float32; torch's SGD writes no copies.
        through_copies = precision == "bf16" and optim.accumulate == 1 and optim.update == "fused"
        self.copies = Copies(module, multiplied if through_copies else [])
        self.update = make_update(self.trainable, averages, self.copies, optim, self.blocked)

    @property
    def momentum_buffers(self) -> dict[str, Tensor]:
        """SGD's momentum by parameter name; empty where momentum is 0."""
        return self.update.buffers

    def to_device(self, view: Tensor) -> Tensor:
        """A loader's view on the device, in the dtype of the first convolution; its memory layout is kept."""
        return view.to(self.device, COMPUTE_DTYPE[self.precision], non_blocking=True)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context that forward runs in."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forward(self, *inputs: Tensor) -> Any:
        """What the module returns, in the precision it is run in."""
        with self.autocast():
            return self.copies(*inputs)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the next step will use, by parameter name."""
        return self.update.gradients()

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        """Add the gradient of sum(losses) / divisor; block the coming steps if any loss is not finite."""
        stacked = torch.stack(list(losses))
        finite = stacked.detach().isfinite().all()
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked.dtype)))
        (stacked.sum() / divisor).backward()

    def step(self, lr: float, *, ema: float) -> None:
        """One optimiser step at learning rate `lr`, unless blocked, and the averages' at momentum `ema`.

        Gradients are cleared either way.
        """
        self.update.step(lr, ema)
        for p in (*self.trainable.values(), *self.copies.by_name.values()):
            p.grad = None
