"""How one process runs the objective: precision, gradients, the guarded optimiser step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmoco.train.config import OptimConfig

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class SingleProcess:
    """Runs `module` on one device; the trainer sees only these methods.

    `blocked` is a 0-d float32 tensor on the device: 0, or 1 from the first non-finite loss on. While it is 1 the
    optimiser leaves weights and momentum as they are. Nothing here reads it back to the host.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, *, precision: str, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.precision = precision
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(
            list(self.trainable.values()),
            lr=optim.lr,
            momentum=optim.sgd_momentum,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        if optim.sgd_momentum:
            # torch's first step sets the buffer to the gradient, which momentum * 0 + gradient is too; starting
            # from zeros keeps it well defined when the very first step is blocked.
            for p in self.trainable.values():
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.blocked = torch.zeros((), device=device)
        # The fused optimiser skips its update where this tensor is 1; gradient scalers use the same door.
        self.optimizer.found_inf = self.blocked  # type: ignore[attr-defined]

    @property
    def momentum_buffers(self) -> dict[str, Tensor]:
        """SGD's momentum by parameter name; empty where momentum is 0."""
        state = self.optimizer.state
        return {name: state[p]["momentum_buffer"] for name, p in self.trainable.items() if p in state}

    def to_device(self, view: Tensor) -> Tensor:
        """A loader's view on the device, in the dtype of the first convolution; its memory layout is kept."""
        return view.to(self.device, COMPUTE_DTYPE[self.precision], non_blocking=True)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context that forward runs in."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        """Add the gradient of sum(losses) / divisor; block the coming steps if any loss is not finite."""
        stacked = torch.stack(list(losses))
        finite = stacked.detach().isfinite().all()
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked.dtype)))
        (stacked.sum() / divisor).backward()

    def step(self, lr: float) -> None:
        """One optimiser step at learning rate `lr`, unless blocked; gradients are cleared either way."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
