"""Many processes with whole copies of the weights, whose gradients are averaged while the backward still runs."""

# No `from __future__ import annotations`: torch looks at the types of the hook.

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fastmoco.distributed.collectives import start_sum, sum_bytes
from fastmoco.distributed.world import World
from fastmoco.train.config import OptimConfig
from fastmoco.train.copies import Copies
from fastmoco.train.engines.single import SingleProcess
from fastmoco.train.objective import Objective


class _Shared(nn.Module):
    """What DistributedDataParallel sees: the trained tensors as gradients reach them, bfloat16 copies among them."""

    def __init__(self, copies: Copies, trainable: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.run = copies
        self.trained = nn.ParameterList(copies.by_name.get(name, p) for name, p in trainable.items())

    def forward(self, *inputs: Tensor | None) -> Any:
        return self.run(*inputs)


class DataParallel(SingleProcess):
    """SingleProcess in every process of the world, with the mean of all their gradients.

    Where training goes through bfloat16 copies, their gradients are averaged in bfloat16: half the bytes.
    """

    name = "ddp"

    def __init__(
        self,
        module: Objective,
        optim: OptimConfig,
        *,
        precision: str,
        world: World,
    ) -> None:
        super().__init__(module, optim, precision=precision, world=world)
        # The graph is the same at every step, which torch cannot use where its first backward sends nothing, and
        # gradients lie in the buckets that are sent. BatchNorm's running statistics are no part of what is shared: each
        # process has its own, and training does not use them.
        self._ddp = DistributedDataParallel(
            _Shared(self.copies, self.trainable),
            process_group=world.group,
            static_graph=optim.accumulate == 1,
            gradient_as_bucket_view=True,
        )
        self._ddp.register_comm_hook(world, _average)
        self._last = True
        self._agreeing: Any = None

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        self._last = last
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def _call(self, *inputs: Tensor | None) -> Any:
        return self._ddp(*inputs)

    def _block_unless(self, finite: Tensor) -> None:
        super()._block_unless(finite)
        if self._last:
            # On its way before the gradients, so that it is there when they are.
            self._agreeing = start_sum(self.world, self.blocked, kind="control", op=dist.ReduceOp.MAX)

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        super().backward(losses, divisor=divisor)
        if self._last:
            self._agreeing.wait()


def _average(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # No method: torch's C++ would hold the engine for ever.
    world.sent["gradients"] += sum_bytes(world, bucket.buffer())
    return allreduce_hook(world.group, bucket)
