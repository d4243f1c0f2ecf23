"""The multiplications that a training step of an encoder needs, alone: how fast it could be with nothing beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.step import StepArgs, as_run
from bench.turns import Turn, take_turn
from fastmoco.models.encoder import Encoder
from fastmoco.train.recipes import find

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the matrices that are multiplied: products of this size are among the fastest.
SIDE = 1024


def multiplications(args: StepArgs) -> int:
    """How many a step on a batch has in the convolutions and linear layers of the encoder: of both forwards, and of
    the gradients of weights and of maps, but for the images, of which none is asked."""
    forward: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        # Of each number that comes out, as many as a row of weights has.
        forward.append(output.numel() * layer.weight[0].numel())

    with torch.device("meta"):
        model = find(args.recipe)(Path(), Path()).model
        encoder = Encoder(args.arch, head=model.head)
        for layer in encoder.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(count)
        encoder(torch.empty(args.batch_size, 3, args.size, args.size))
    return 4 * sum(forward) - forward[0]


class Products:
    """As many multiplications as a step has, as products of square matrices in the dtype that a run has: the fastest
    that there are, without any layer's own shape, memory and work between products."""

    def __init__(self, args: StepArgs) -> None:
        self._args = args
        # Rounded down, that the limit is not understated.
        self.count = max(1, multiplications(args) // SIDE**3)
        dtype = DTYPES[as_run(args.device).precision]
        self._a, self._b, self._out = (torch.randn(SIDE, SIDE, device=args.device).to(dtype) for _ in range(3))

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`."""

        def use(_: Any) -> int:
            for _ in range(self.count):
                torch.mm(self._a, self._b, out=self._out)
            return self._args.batch_size

        batches: Iterator[None] = repeat(None)
        finish = torch.cuda.synchronize if self._args.device != "cpu" else lambda: None
        return take_turn(nullcontext(batches), use, seconds=seconds, burst=1, finish=finish)
