"""bfloat16 copies of weights, for a forward and backward that need not round them anew at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.train.config import OptimConfig


def uses_copies(optim: OptimConfig, precision: str) -> bool:
    """Whether training goes through copies: several micro-batches sum their gradients, which takes float32, and torch's
    SGD writes no copies."""
    return precision == "bf16" and optim.accumulate == 1 and optim.update == "fused"


class Copies:
    """The bfloat16 copies through which `module` runs; its own weights stay as they are, the float32 originals.

    Under autocast each step rounds every weight of a convolution or linear layer to bfloat16, and widens the gradient
    that comes back. A copy holds the same rounded weight from step to step and takes the gradient as it comes; what
    updates the original (ops/sgd_ema.py) writes its copy in the same pass. So the losses are those of autocast to the
    last bit, and gradients too as long as each is made by one backward: a sum of several would be rounded.

    `by_name` holds the copies of the weights `names` of `module`; they require a gradient where the weight does.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module = module
        self.originals = {name: module.get_parameter(name) for name in names}
        self.by_name: dict[str, Tensor] = {
            name: nn.Parameter(weight.detach().bfloat16(), weight.requires_grad)
            for name, weight in self.originals.items()
        }

    def __call__(self, *inputs: Tensor | None) -> Any:
        """`module(*inputs)` with the copies in place of the weights."""
        return torch.func.functional_call(self.module, self.by_name, inputs, tie_weights=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the originals again, which something other than the update has written."""
        for name, copy in self.by_name.items():
            copy.copy_(self.originals[name])
