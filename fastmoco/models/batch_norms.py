"""BatchNorms of other statistics than the batch's own: those of all processes, of groups of its images, or none new."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from fastmoco.distributed.collectives import gather, start_sum
from fastmoco.distributed.world import World
from fastmoco.errors import UserError

Norm = Literal["batch", "sync", "frozen"]


def convert_norms(module: nn.Module, norm: Norm, *, groups: int = 1, world: World) -> None:
    """Makes every BatchNorm1d and BatchNorm2d of `module` one of `norm`, its parameters, names and place as they are.

    "batch" takes the statistics of each process's batch, in `groups` of consecutive images, each on its own; "sync"
    those of the batches of all of `world`; "frozen" the running statistics, which stay as they are. In evaluation mode
    all are torch's own.
    """
    # In a world of one its batch is the whole batch, and torch's modules, and those fused with them, are the faster.
    if norm == "sync" and not world.alone:
        kinds: tuple[Any, Any] = SyncBatchNorm1d, SyncBatchNorm2d
    elif norm == "frozen":
        kinds = FrozenBatchNorm1d, FrozenBatchNorm2d
    elif groups > 1:
        kinds = GroupedBatchNorm1d, GroupedBatchNorm2d
    else:
        return
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.__class__ = kinds[isinstance(part, nn.BatchNorm2d)]
            part.world, part.groups = world, groups  # type: ignore[assignment]


class _Synchronised(_BatchNorm):
    """Takes mean and variance over the batches of all processes of `world`, of one shape each; so the gradients.

    The float32 (for float64 maps float64) statistics are combined as means and centred sums of squares. One gather in
    the forward, one sum in the backward, counted as "norms". Nothing waits for a GPU.
    """

    world: World

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, H, W), as the class says -> the same."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        mean, variance = _statistics(x, self.world)
        count = self.world.size * (x.numel() // x.shape[1])
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            assert self.num_batches_tracked is not None
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        out: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, variance, self.eps, self.world)
        return out


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """A BatchNorm1d over all processes."""


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """A BatchNorm2d over all processes."""


@torch.no_grad()
def _statistics(x: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel over the batches of all processes, equally large."""
    # Running statistics are given for their dtype, which the result has: a bfloat16 map's own would be too coarse.
    unused = x.new_zeros((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    own = torch.stack(torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0))
    means, variances = gather(world, own[None], kind="norms").unbind(dim=1)
    mean = means.mean(dim=0)
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias, and the gradient through mean and variance too.

    With g the gradient to y, x_hat the map before weight and bias, and averages over the batches of all processes,
    dx = weight / sqrt(variance + epsilon) * (g - mean g - x_hat mean(g x_hat)).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float, world: World
    ) -> Tensor:
        ctx.epsilon, ctx.world = epsilon, world
        ctx.save_for_backward(x, weight, mean, variance)
        # torch's kernels take narrow maps with wide statistics, and then want weight and bias as wide.
        wide_weight, wide_bias = weight.to(mean.dtype), bias.to(mean.dtype)
        return batch_norm(x, mean, variance, wide_weight, wide_bias, training=False, eps=epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        invstd = (variance + ctx.epsilon).rsqrt()
        wide_weight = weight.to(mean.dtype)
        # Of torch's own backward first the sums, sum g x_hat and sum g, then, while they are on their way, g * weight *
        # invstd, which is what it gives for statistics that do not depend on x.
        given = (g, x, wide_weight, mean, variance, mean, invstd)
        backward = torch.ops.aten.native_batch_norm_backward
        _, dweight, dbias = backward(*given, True, ctx.epsilon, [False, True, True])
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([dweight, dbias])
            work = start_sum(ctx.world, sums, kind="norms")
            dx, _, _ = backward(*given, False, ctx.epsilon, [True, False, False])
            work.wait()
            along, level = sums * (wide_weight * invstd * (x.shape[1] / (x.numel() * ctx.world.size)))
            dx -= batch_norm(x, mean, variance, along, level, training=False, eps=ctx.epsilon)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None, None


class _Frozen(_BatchNorm):
    """Takes the running statistics in training too, and leaves them as they are; weight and bias are trained."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, H, W), as the class says -> the same."""
        self._check_input_dim(x)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """A BatchNorm1d with the statistics it has."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """A BatchNorm2d with the statistics it has."""


class _Grouped(_BatchNorm):
    """Normalises `groups` of consecutive images, of one size, each by its own statistics.

    The running statistics move once a batch, towards the groups' mean.
    """

    groups: int

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, H, W), as the class says -> the same. Raises UserError where `groups` does not divide N."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if len(x) % self.groups:
            raise UserError(
                f"--norm-groups {self.groups}: a process's {len(x)} images of a micro-batch cannot be shared out "
                "evenly to so many groups; choose a number that divides them"
            )
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        means, variances = (running.repeat(self.groups, 1) for running in (self.running_mean, self.running_var))
        out = [
            batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.groups), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(out)


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """A BatchNorm1d of each group."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """A BatchNorm2d of each group."""
