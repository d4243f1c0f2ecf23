"""One process: precision, gradients, the guarded optimiser step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.config import OptimConfig
from fastmoco.train.copies import Copies, uses_copies
from fastmoco.train.engines.engine import autocast
from fastmoco.train.engines.loss_scale import LossScale
from fastmoco.train.objective import Objective
from fastmoco.train.update import make_update


class SingleProcess:
    """Runs `module`, which is on the world's device; see `Engine`. Nothing here reads a tensor back to the host."""

    def __init__(
        self,
        module: Objective,
        optim: OptimConfig,
        *,
        precision: str,
        world: World,
    ) -> None:
        self.module = module
        self.world = world
        self.device = world.device
        self.precision = precision
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.blocked = torch.zeros((), device=self.device)
        self.scaler = LossScale(self.device) if precision == "fp16" else None
        # What the update skips for: blocked, or gradients that overflowed.
        self._skip = self.blocked if self.scaler is None else torch.zeros((), device=self.device)
        self.copies = Copies(module, module.multiplied if uses_copies(optim, precision) else [])
        self._keeps = False
        self.update = make_update(self.trainable, module.averages, self.copies, optim, self._skip)

    name = "single"
    shards_weights = False

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def forward(self, *inputs: Tensor | None) -> Any:
        with autocast(self.precision, self.device):
            return self._call(*inputs)

    def _call(self, *inputs: Tensor | None) -> Any:
        return self.copies(*inputs)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the next step will use, by parameter name."""
        return self.update.gradients()

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        if self._keeps:
            # Said once, while a graph is captured: the backward then makes new ones, where all replays write theirs.
            self._forget_gradients()
        stacked = torch.stack(list(losses))
        self._block_unless(stacked.detach().isfinite().all())
        total = stacked.sum() / divisor
        (total if self.scaler is None else total * self.scaler.scale).backward()

    def _block_unless(self, finite: Tensor) -> None:
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked.dtype)))

    def step(self, lr: float, *, ema: float) -> None:
        if self.scaler is not None:
            overflowed = self.scaler.unscale_(list(self.gradients.values()))
            self._skip.copy_(torch.maximum(self.blocked, overflowed))
            self.scaler.update(overflowed)
        self.update.step(lr, ema)
        if not self._keeps:
            self._forget_gradients()

    def keep_gradients(self) -> None:
        self._keeps = True

    def _forget_gradients(self) -> None:
        for p in (*self.trainable.values(), *self.copies.by_name.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        tensors = {f"module.{name}": p.detach() for name, p in self.module.named_parameters()}
        tensors |= {f"momentum.{name}": buffer for name, buffer in self.update.buffers.items()}
        if self.scaler is not None:
            tensors |= {"scaler.scale": self.scaler.scale, "scaler.good": self.scaler.good}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        mine = self.state()
        check_fits(mine, tensors)
        for name, value in mine.items():
            value.copy_(tensors[name])
        self.copies.refresh()


def check_fits(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `tensors` holds each of `mine`, in its shape, and no other momentum or loss scale."""
    optimiser = {name for name in tensors if name.startswith(("momentum.", "scaler."))}
    differing = sorted((mine.keys() - tensors.keys()) | (optimiser - mine.keys()))
    if differing:
        raise UserError(f"the checkpoint does not fit: it and this run differ in {', '.join(differing[:4])}")
    for name, value in mine.items():
        if tensors[name].shape != value.shape:
            raise UserError(
                f"the checkpoint does not fit: {name} is {tuple(tensors[name].shape)} there, {tuple(value.shape)} here"
            )
