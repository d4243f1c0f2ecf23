"""The projector in front of a stage's cross-correlation loss."""

from __future__ import annotations

from torch import nn


class Projector(nn.Sequential):
    """(N, d) -> (N, width): three Linear layers without bias, BatchNorm and ReLU after the first two.

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
