"""Objectives beside those of the other libraries' names, for any loop: `from fastmoco.adapters.objectives import
SupConLoss`.

NT-Xent, its additive margin and Barlow Twins are in fastmoco.adapters.lightly. Stage losses are added to any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.adapters.between import gather, gather_rows
from fastmoco.ops.batch_contrast import supcon
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.mixed_crosscorr import mix, mixed_crosscorr

__all__ = ["MixedBarlowTwinsLoss", "SupConLoss", "mix_views"]


class SupConLoss(nn.Module):
    """The supervised contrastive loss (Khosla et al. 2020, L_out): the positives of a view are the other view of its
    image and both views of all images of its class.

    temperature: divides the similarities. gather_distributed: whether images of all processes are compared; each
    process then gives equally many.
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = False) -> None:
        super().__init__()
        self.temperature, self.gather_distributed = temperature, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor, targets: Tensor) -> Tensor:
        """Of projections (N, D), of any length, and classes (N,) int64, -1 where it is unknown: a 0-d tensor."""
        if self.gather_distributed:
            out0, out1, targets = gather(out0), gather(out1), gather_rows(targets)
        return supcon(out0, out1, targets, temperature=self.temperature).loss


def mix_views(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 3, H, W) that are mixed of two views, and how, for `MixedBarlowTwinsLoss`: the order (N,) int64 in
    which the second views are taken, and the share of the first, a 0-d tensor, drawn by torch's generators."""
    order = torch.randperm(len(x0), device=x0.device)
    share = torch.rand((), device=x0.device)
    return mix(x0, x1, order, share), order, share


class MixedBarlowTwinsLoss(nn.Module):
    """Barlow Twins with its regulariser by mixed samples (Bandara et al. 2023): the loss of lightly's `BarlowTwinsLoss`
    and `lambda_param * mix_weight` times that of the mixed pictures, of this process's images."""

    def __init__(self, lambda_param: float = 5e-3, mix_weight: float = 5.0) -> None:
        super().__init__()
        self.lambda_param, self.mix_weight = lambda_param, mix_weight

    def forward(self, z_a: Tensor, z_b: Tensor, z_mixed: Tensor, order: Tensor, share: Tensor) -> Tensor:
        """Of projections (N, D) of both views and of the pictures that `mix_views` made of them, N at least 2."""
        mixed = mixed_crosscorr(z_mixed, z_a, z_b, order, share)
        return crosscorr(z_a, z_b, off_diagonal=self.lambda_param) + self.lambda_param * self.mix_weight * mixed
