"""The multiplications that a training step of an encoder needs, alone: how fast it could be with nothing beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step import StepArgs, as_run
from bench.timing import interleaved
from bench.turns import Turn, take_turn
from fastmoco.models.encoder import Encoder
from fastmoco.train.recipes import find

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the square matrices that are multiplied, where those are fastest.
SIDES = (512, 1024)
# Images, channels and side of the maps, where convolutions are.
MAPS = (8, 256, 16)


@dataclass(frozen=True)
class Product:
    """So many multiplications at a call of `run`."""

    run: Callable[[], object]
    multiplications: int


def candidates(dtype: torch.dtype) -> dict[str, Product]:
    """What may multiply fastest on a CPU: matrix products, and a channels-last convolution of 3 x 3. The padding counts
    as it does in the layers'."""

    def matrices(side: int) -> Product:
        a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
        return Product(lambda: torch.mm(a, b, out=out), side**3)

    def convolution() -> Product:
        images, channels, side = MAPS
        maps, weight = (
            torch.randn(shape).to(dtype, memory_format=torch.channels_last)
            for shape in ((images, channels, side, side), (channels, channels, 3, 3))
        )
        return Product(lambda: F.conv2d(maps, weight, padding=1), images * side**2 * weight.numel())

    return {f"products of {side} x {side}": matrices(side) for side in SIDES} | {"convolutions": convolution()}


def fastest(products: Mapping[str, Product], *, rounds: int = 5) -> Product:
    """That with the most multiplications a second in its best of some runs by turns, warmed up."""
    taken = interleaved({name: product.run for name, product in products.items()}, rounds=rounds)
    return max(products.items(), key=lambda item: item[1].multiplications / min(taken[item[0]]))[1]


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
    """As many multiplications as a step has, by the fastest of `candidates` in the dtype that a run has, without any
    layer's own shape, memory and work between products. On CPUs: elsewhere launches are what takes the time."""

    def __init__(self, args: StepArgs) -> None:
        self.product = fastest(candidates(DTYPES[as_run("cpu").precision]))
        wanted = multiplications(args)
        self.count = max(1, wanted // self.product.multiplications)
        # What is done amounts to so many pairs; rounded up, that the limit is not understated.
        self.pairs = -(-self.count * self.product.multiplications * args.batch_size // wanted)

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`."""

        def use(_: Any) -> int:
            for _ in range(self.count):
                self.product.run()
            return self.pairs

        batches: Iterator[None] = repeat(None)
        return take_turn(nullcontext(batches), use, seconds=seconds, burst=1)
