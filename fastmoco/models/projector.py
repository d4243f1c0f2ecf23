"""The projector in front of a stage's cross-correlation loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Three Linear layers without bias, BatchNorm and ReLU after the first two, for any number of views at once.

    As in Barlow Twins (Zbontar et al. 2021); the standardisation that follows belongs to the loss.
    """

    def __init__(self, features: int, width: int = 2048) -> None:
        super().__init__(
            nn.Linear(features, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Each view (N, d) -> its projection (N, width), the same as one after the other.

        A batch is small beside the weights. Together the views read them once, and their gradients need no sum. The
        statistics of a BatchNorm are each view's own.
        """
        sizes = [len(view) for view in views]
        x = torch.cat(views)
        for layer in self:
            by_view = isinstance(layer, nn.BatchNorm1d)
            x = torch.cat([layer(view) for view in x.split(sizes)]) if by_view else layer(x)
        return x.split(sizes)
