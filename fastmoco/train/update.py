"""How an optimiser step reaches the weights: SGD or LARS on those that are trained, and the average that follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmoco.ops.ema import ema_update_
from fastmoco.ops.sgd_ema import sgd_ema_update_
from fastmoco.train.config import OptimConfig
from fastmoco.train.copies import Copies
from fastmoco.train.lars import lars_update_

Parameters = Mapping[str, nn.Parameter]


class Update(Protocol):
    """SGD or LARS with momentum on parameters by name, and averages of some of them.

    `buffers` is the momentum by the parameter's name; empty where momentum is 0. Parameters without a gradient are
    left alone.
    """

    buffers: dict[str, Tensor]

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that `step` will use, by the parameter's name."""

    def step(self, lr: float, ema: float) -> None:
        """One optimiser step at `lr`, unless blocked; then average <- ema * average + (1 - ema) * parameter."""


class TorchUpdate:
    """torch.optim.SGD, then the average: two passes over memory.

    `parameters` and the `averages` of some, by the parameter's name; while the 0-d float32 tensor `blocked` is 1,
    parameters and momentum stay as they are.
    """

    def __init__(
        self, parameters: Parameters, averages: Mapping[str, Tensor], optim: OptimConfig, blocked: Tensor
    ) -> None:
        self.parameters = parameters
        self.averages = list(averages.values())
        self.sources = [parameters[name] for name in averages]
        self.optimizer = torch.optim.SGD(
            list(parameters.values()),
            lr=optim.lr,
            momentum=optim.sgd_momentum,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.buffers = _zero_buffers(parameters, optim)
        # torch's first step sets the buffer to the gradient, which momentum * 0 + gradient is too; starting from
        # zeros keeps it well defined when the very first step is blocked.
        for name, buffer in self.buffers.items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
        # The fused optimiser skips its update where this tensor is 1; gradient scalers use the same door.
        self.optimizer.found_inf = blocked  # type: ignore[attr-defined]

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def step(self, lr: float, ema: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        ema_update_(self.averages, self.sources, ema)


class _ThroughCopies:
    """What the updates share that take gradients from `copies` of some parameters, and write those of some averages.

    The other arguments are TorchUpdate's.
    """

    def __init__(
        self,
        parameters: Parameters,
        averages: Mapping[str, Tensor],
        copies: Copies,
        optim: OptimConfig,
        blocked: Tensor,
    ) -> None:
        self.parameters = parameters
        self.averages = averages
        self.copies = copies.by_name
        by_original = {id(copies.originals[name]): copy for name, copy in self.copies.items()}
        self.shadows = {name: by_original.get(id(average)) for name, average in averages.items()}
        self.optim = optim
        self.blocked = blocked
        self.buffers = _zero_buffers(parameters, optim)

    def gradients(self) -> dict[str, Tensor]:
        made = {name: self.copies.get(name, p).grad for name, p in self.parameters.items()}
        return {name: gradient for name, gradient in made.items() if gradient is not None}

    def _follow(self, names: list[str], ema: float) -> None:
        """Move the averages called `names` to where their parameters are, and their shadows with them."""
        ema_update_([self.averages[name] for name in names], [self.parameters[name] for name in names], ema)
        for name in names:
            shadow = self.shadows[name]
            if shadow is not None:
                shadow.copy_(self.averages[name])


class FusedUpdate(_ThroughCopies):
    """SGD and the average in one pass over memory (ops/sgd_ema.py), the same as TorchUpdate to rounding."""

    def step(self, lr: float, ema: float) -> None:
        gradients = self.gradients()
        # A pass has shadows for all its averages or for none.
        for shadowed in (True, False):
            names = [name for name in gradients if (self.shadows.get(name) is not None) == shadowed]
            sgd_ema_update_(
                [self.parameters[name] for name in names],
                [gradients[name] for name in names],
                [self.buffers[name] for name in names] if self.buffers else [],
                [self.averages.get(name) for name in names],
                lr=lr,
                momentum=self.optim.sgd_momentum,
                weight_decay=self.optim.weight_decay,
                ema=ema,
                found_inf=self.blocked,
                shadows=[self.shadows[name] for name in names] if shadowed else None,
                copies=[self.copies.get(name) for name in names],
            )
        self._follow([name for name in self.averages if name not in gradients], ema)


class LarsUpdate(_ThroughCopies):
    """LARS (lars.py), then the average."""

    @torch.no_grad()
    def step(self, lr: float, ema: float) -> None:
        gradients = self.gradients()
        lars_update_(
            [self.parameters[name] for name in gradients],
            list(gradients.values()),
            [self.buffers[name] for name in gradients] if self.buffers else [],
            lr=lr,
            momentum=self.optim.sgd_momentum,
            weight_decay=self.optim.weight_decay,
            trust=self.optim.lars_trust,
            blocked=self.blocked,
        )
        for name, copy in self.copies.items():
            if name in gradients:
                copy.copy_(self.parameters[name])
        self._follow(list(self.averages), ema)


def make_update(
    parameters: Parameters, averages: Mapping[str, Tensor], copies: Copies, optim: OptimConfig, blocked: Tensor
) -> Update:
    """The one that `optim.optimizer` and `optim.update` name."""
    if optim.optimizer == "lars":
        return LarsUpdate(parameters, averages, copies, optim, blocked)
    if optim.update == "fused":
        return FusedUpdate(parameters, averages, copies, optim, blocked)
    return TorchUpdate(parameters, averages, optim, blocked)


def _zero_buffers(parameters: Parameters, optim: OptimConfig) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in parameters.items()} if optim.sgd_momentum else {}
