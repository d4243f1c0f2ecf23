"""lightly's names (of release 1.6) over fused operations: `from fastmoco.adapters.lightly import NTXentLoss`.

Arguments, defaults, shapes and the keys of state dicts are lightly's, and so are values and gradients, to the rounding
of float32; docs/adapters.md has what differs and why. lightly itself is not needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.adapters.between import gather, gather_rows, shuffle_rows, take_rows, world
from fastmoco.adapters.parts import crosscorr_over_processes, move_average
from fastmoco.ops.batch_contrast import ntxent
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce
from fastmoco.ops.queue_push import queue_push_

__all__ = [
    "BarlowTwinsLoss",
    "MemoryBankModule",
    "MoCoProjectionHead",
    "NTXentLoss",
    "activate_requires_grad",
    "batch_shuffle",
    "batch_unshuffle",
    "deactivate_requires_grad",
    "update_momentum",
]

# Temperatures nearer to 0 are refused, as in lightly.
_LEAST_TEMPERATURE = 1e-8


class MemoryBankModule(nn.Module):
    """The last `size` = (K, D) features, as the buffer `bank` (K, D) float32; 0 for none. K alone, which lightly 1.6
    refuses and earlier ones warn of, leaves D to the first batch.

    gather_distributed: whether the features of all processes are kept, those of this one alone otherwise.
    feature_dim_first: whether `forward` returns the bank as (D, K) rather than (K, D).
    wrap: whether a batch that reaches over the end of the bank goes on at its start. lightly, and this by default,
        drops the part that does not fit.
    persistent: whether the bank and its pointer are in the state dict, so that training that is resumed goes on with
        the same negatives. Not in lightly, and not by default.

    Raises ValueError for a size below 0, or of more than two numbers.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        wrap: bool = False,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(part < 0 for part in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if len(self.size) > 2:
            raise ValueError(f"Illegal memory bank size {size}: it is (number of features, dimension), or 0")
        if len(self.size) == 1 and self.size[0] > 0:
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is recommended to set the "
                "feature dimension with 'size=(n, dim)' when creating the memory bank. Distributed training might fail "
                "if the feature dimension is not set.",
                UserWarning,
                stacklevel=2,
            )
        self.gather_distributed, self.feature_dim_first, self.wrap = gather_distributed, feature_dim_first, wrap
        bank = _random_bank(*self.size) if len(self.size) == 2 else torch.empty(self.size)
        self.register_buffer("bank", bank, persistent=persistent)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=persistent)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`output` (N, D) as it is, and a copy of the bank, None where there is none; with `update`, `output` is
        then kept. `labels` are ignored."""
        if self.size[0] == 0:
            return output, None
        bank = self.filled(output).clone()
        if update:
            self.enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    def filled(self, batch: Tensor) -> Tensor:
        """The bank (K, D) itself; where its dimension was not given, it begins as that of `batch` (N, D)."""
        if self.bank.ndim == 1:
            self.bank = _random_bank(len(self.bank), batch.shape[1]).to(self.bank)
        return self.bank

    @torch.no_grad()
    def enqueue(self, batch: Tensor) -> None:
        """Keep `batch` (N, D) over the oldest rows."""
        if self.gather_distributed:
            batch = gather_rows(batch)
        batch = batch.detach().to(self.bank.dtype)
        if self.wrap:
            queue_push_(self.bank, self.bank_ptr.view(()), batch)
            return
        start = int(self.bank_ptr)
        end = min(start + len(batch), len(self.bank))
        self.bank[start:end] = batch[: end - start]
        self.bank_ptr.fill_(end % len(self.bank))


def _random_bank(rows: int, dim: int) -> Tensor:
    return normalize(torch.randn(rows, dim), dim=1)


class NTXentLoss(nn.Module):
    """Contrastive loss of two views (SimCLR), or of a view against a memory bank (MoCo): a 0-d tensor.

    temperature: divides the similarities.
    memory_bank_size: (K, D) of the bank, 0 for none: then the other images of the batch are the negatives.
    gather_distributed: whether those of all processes are.
    margin: subtracted from the similarity of the two views, from 0 to 2 (additive margin; not in lightly).

    Raises ValueError for a temperature of 0, a margin out of its range, or as `MemoryBankModule` does.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        wrap: bool = False,
        persistent: bool = False,
        margin: float = 0.0,
    ) -> None:
        super().__init__()
        if abs(temperature) < _LEAST_TEMPERATURE:
            raise ValueError(f"Illegal temperature: abs({temperature}) < {_LEAST_TEMPERATURE}")
        if not 0 <= margin <= 2:
            raise ValueError(f"Illegal margin: {margin} is not from 0 to 2")
        _require_distributed(gather_distributed)
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, wrap=wrap, persistent=persistent)
        self.temperature, self.gather_distributed, self.margin = temperature, gather_distributed, margin

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Of projections `out0` and `out1` (N, D), which need not be of unit length. `out1` is kept in the memory bank
        where `out0` requires a gradient."""
        if self.memory_bank.size[0] == 0:
            return self._within_batch(out0, out1)
        out1 = normalize(out1, dim=1)
        loss = self._against_bank(out0, out1)
        if out0.requires_grad:
            # The loss has its gradients already: what is overwritten is no longer needed.
            self.memory_bank.enqueue(out1)
        return loss

    def symmetric(self, query0: Tensor, key1: Tensor, query1: Tensor, key0: Tensor) -> Tensor:
        """The mean of the losses of `query0` against `key1` and of `query1` against `key0`, (N, D) each: queries and
        keys of both views. Both are against the bank as it was, and then both views' keys are kept. With two calls of
        `forward` the second has the first's keys, of the same images, among its negatives.

        Raises ValueError without a memory bank, where `forward` is symmetric already.
        """
        if self.memory_bank.size[0] == 0:
            raise ValueError("symmetric() is for a memory bank; without one the loss is of both views already")
        keys = [normalize(key, dim=1) for key in (key1, key0)]
        losses = [self._against_bank(query, key) for query, key in zip((query0, query1), keys, strict=True)]
        if query0.requires_grad:
            self.memory_bank.enqueue(torch.cat(keys))
        return (losses[0] + losses[1]) / 2

    def _within_batch(self, out0: Tensor, out1: Tensor) -> Tensor:
        everyone, first = None, 0
        if self.gather_distributed:
            everyone, first = (gather(out0), gather(out1)), world().rank * len(out0)
        return ntxent(
            out0, out1, temperature=self.temperature, margin=self.margin, everyone=everyone, first=first
        ).loss

    def _against_bank(self, query: Tensor, key: Tensor) -> Tensor:
        bank = self.memory_bank.filled(key).to(query.device)
        query = normalize(query, dim=1)
        # A temperature below 0 turns the similarities round.
        query = query if self.temperature > 0 else -query
        return infonce(query, key, bank, temperature=abs(self.temperature), margin=self.margin)


class BarlowTwinsLoss(nn.Module):
    """`sum_i (C_ii - 1)^2 + lambda_param * sum_{i != j} C_ij^2` of the cross-correlation C of two projections.

    gather_distributed: whether C is the mean of all processes', each standardised over its own images.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        _require_distributed(gather_distributed)
        self.lambda_param, self.gather_distributed = lambda_param, gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Of projections (N, D) of two views, N at least 2."""
        if self.gather_distributed:
            return crosscorr_over_processes(z_a, z_b, off_diagonal=self.lambda_param)
        return crosscorr(z_a, z_b, off_diagonal=self.lambda_param)


class MoCoProjectionHead(nn.Module):
    """`num_layers` linear layers with ReLU between them, of MoCo v2, and with `batch_norm` those of MoCo v3:
    (N, input_dim) -> (N, output_dim)."""

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * max(1, num_layers - 1), output_dim]
        layers: list[nn.Module] = []
        for place, (wide, to) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(wide, to, bias=not batch_norm))
            layers += [nn.BatchNorm1d(to)] if batch_norm else []
            layers += [nn.ReLU()] if place < len(widths) - 2 else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The projections of features `x`."""
        projection: Tensor = self.layers(x)
        return projection


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Every parameter of `model_ema` <- m * itself + (1 - m) * that of `model`; buffers stay as they are.

    Raises UserError (a ValueError) where the two have not the same shapes, or `m` is not from 0 to 1.
    """
    move_average(model_ema, model, m)


def deactivate_requires_grad(model: nn.Module) -> None:
    """Have no parameter of `model` require a gradient."""
    model.requires_grad_(False)


def activate_requires_grad(model: nn.Module) -> None:
    """Have every parameter of `model` require a gradient."""
    model.requires_grad_(True)


@torch.no_grad()
def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """`batch` (N, ...) in random order, and what restores it: with `distributed` images of all processes, the same
    number for each."""
    if distributed:
        return shuffle_rows(batch)
    order = torch.randperm(len(batch), device=batch.device)
    return batch[order], order


@torch.no_grad()
def batch_unshuffle(batch: Tensor, shuffle: Tensor, distributed: bool = False) -> Tensor:
    """`batch` (N, ...) in the order before `batch_shuffle`, which gave `shuffle`."""
    return take_rows(batch, shuffle) if distributed else batch[torch.argsort(shuffle)]


def _require_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed needs torch.distributed, which this build of PyTorch lacks")
